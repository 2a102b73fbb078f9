"""The word to end, which a signal may give at any moment and to any thread."""

import os
import select
import signal
from collections.abc import Callable
from types import FrameType


class Ending:
    """Asked for once, and for good; for one thread to wait for.

    `threading.Event` is not for signals. Its `set`, in a handler, waits for ever for a lock that the very code may hold
    which the signal interrupts; and a main thread that waits for a lock does not hear of a signal that the system gave to
    another thread. So this waits for a pipe, into which Python writes of every signal.
    """

    def __init__(self) -> None:
        self._heard, self._told = os.pipe()  # for as long as the process lives: a signal may always come
        os.set_blocking(self._heard, False)
        os.set_blocking(self._told, False)  # where the pipe is full somebody hears already
        self._is_asked = False

    def listen(self, *numbers: signal.Signals) -> None:
        """Be asked for by these signals from now on, whichever thread they reach; a second one does what it else does.

        Only in the main thread, and of a process that is ours: it takes over what wakes it up at signals.
        """
        handler: Callable[[int, FrameType | None], None] = self._on_signal
        for number in numbers:
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._told, warn_on_full_buffer=False)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        self.ask()

    def ask(self) -> None:
        """From now on it is time to end."""
        self._is_asked = True
        try:
            os.write(self._told, b"\0")
        except BlockingIOError:
            return

    def is_asked(self) -> bool:
        """Whether it is time to end."""
        return self._is_asked

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until it is, or until about so many seconds have passed; whether it is."""
        while not self._is_asked:
            if not select.select([self._heard], [], [], timeout_s)[0]:
                return self._is_asked
            os.read(self._heard, 4096)  # of this signal or another: its handler runs before the next line
        return True
