"""A process that talks to nobody but its callers: no words of gRPC's, no core dump, no traceback with values in it."""

import logging
import os
import resource
import threading

from fedmini.events import Emit


def silence_grpc() -> None:
    """Switch off what gRPC logs, whatever the environment asks for: its traces show messages. Before grpc is imported."""
    os.environ["GRPC_VERBOSITY"] = "NONE"
    os.environ.pop("GRPC_TRACE", None)
    logger = logging.getLogger("grpc")
    logger.addHandler(logging.NullHandler())
    logger.propagate = False


def leave_no_dumps(emit: Emit) -> None:
    """No core file of this process, no file that others can read, and of a thread that fails the class of the failure."""
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def say(failed: threading.ExceptHookArgs) -> None:
        emit("device.thread_failed", error=failed.exc_type.__name__)

    threading.excepthook = say
