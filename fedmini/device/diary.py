"""What a device has to say: why it does not train now, what went wrong last, and the events that its app hears."""

import ssl
from enum import IntEnum

from fedmini.errors import FedMiniError, LinkError
from fedmini.events import Emit, Field

STRANGER = "the server does not know this device (any more): ask who runs it"


class About(IntEnum):
    """What a problem is about: what goes well later says that it, and all before it, is over."""

    LINK = 1
    OFFER = 2
    ROUND = 3


class Diary:
    """For the owner of a device, from any thread. Nothing in it is from an example. Never raises."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._about = About.LINK
        self.why: str | None = None  # why it does not train, while it runs; None: it is connected, and would
        self.problem: str | None = None  # what went wrong last, if it has not gone well since

    def tell(self, event: str, /, **fields: Field) -> None:
        """An event for the app, whose own failure is not the device's."""
        try:
            self._emit(event, **fields)
        except BaseException:  # an app's code, in a thread of ours: it must end neither
            return

    def note(self, error: BaseException, about: About) -> None:
        """Remember a problem, in words: our own, or the class of a library's failure."""
        self._about, self.problem = about, in_words(error)
        self.tell("device.problem", problem=self.problem)

    def went_well(self, about: About) -> None:
        """What was wrong with this, or with what comes before it, is over."""
        if self._about <= about:
            self.problem = None


def in_words(error: BaseException) -> str:
    """An error for a device's owner. A library's words could hold what a person typed: its class says enough."""
    if isinstance(error, LinkError) and error.status in (401, 403):
        return STRANGER
    if isinstance(error, LinkError) and (refused := _refused_certificate(error)) is not None:
        return f"{error}: its certificate is not to be trusted here ({refused}); compare server_key, and this clock"
    return str(error) if isinstance(error, FedMiniError) else f"a failure inside: {type(error).__name__}"


def _refused_certificate(error: BaseException) -> str | None:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return cause.verify_message
        cause = cause.__cause__ or cause.__context__
    return None
