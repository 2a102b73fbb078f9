"""The word to end, given by a signal at any moment whatever, to any thread whatever."""

import subprocess
import sys
import threading
import time

import pytest

from fedmini.ending import Ending

# A signal comes every 50 microseconds of the processor's time, while the main thread only looks whether it is asked.
INTERRUPTED = """
import signal, threading
from fedmini.ending import Ending
num_signals = 0
def ask(*_):
    global num_signals
    num_signals += 1
    {ask}
ending = {made}
signal.signal(signal.SIGVTALRM, ask)
signal.setitimer(signal.ITIMER_VIRTUAL, 50e-6, 50e-6)
while num_signals < 2000:
    {look}
signal.setitimer(signal.ITIMER_VIRTUAL, 0)
"""
# The signal reaches a thread that computes nothing, while the main thread waits.
ELSEWHERE = """
import signal, threading, time
from fedmini.ending import Ending
ending = {made}
{listen}
other = threading.Thread(target=time.sleep, args=(60,), daemon=True)
other.start()
threading.Timer(0.5, signal.pthread_kill, (other.ident, signal.SIGTERM)).start()
ending.wait()
"""
WAIT_S = 8.0


def run(program: str, timeout_s: float) -> int:
    return subprocess.run([sys.executable, "-c", program], timeout=timeout_s).returncode


def test_it_can_be_asked_for_by_a_handler_whatever_that_interrupts() -> None:
    program = INTERRUPTED.format(made="Ending()", ask="ending.ask()", look="ending.wait(0); ending._is_asked = False")
    assert run(program, 10 * WAIT_S) == 0


def test_an_event_would_have_waited_for_the_lock_of_what_the_handler_interrupts() -> None:
    program = INTERRUPTED.format(made="threading.Event()", ask="ending.set()", look="ending.wait(0); ending.clear()")
    with pytest.raises(subprocess.TimeoutExpired):
        run(program, WAIT_S)


def test_a_signal_that_reaches_another_thread_is_heard() -> None:
    assert run(ELSEWHERE.format(made="Ending()", listen="ending.listen(signal.SIGTERM)"), 10 * WAIT_S) == 0


def test_an_event_would_not_have_heard_of_it() -> None:
    listen = "signal.signal(signal.SIGTERM, lambda *_: ending.set())"
    with pytest.raises(subprocess.TimeoutExpired):
        run(ELSEWHERE.format(made="threading.Event()", listen=listen), WAIT_S)


def test_whoever_waits_hears_of_it_and_whoever_comes_later_too() -> None:
    ending = Ending()
    assert not ending.wait(0.0) and not ending.wait(0.01) and not ending.is_asked()
    threading.Timer(0.1, ending.ask).start()
    began = time.monotonic()
    assert ending.wait(60.0) and time.monotonic() - began < 30
    assert ending.wait() and ending.wait(0.0) and ending.is_asked()
    for _ in range(2**17):  # more than the pipe holds
        ending.ask()
