"""A child process that dies at one of its calls on the file system."""

import os
import sys
from collections.abc import Callable

KILLED, REFUSED = 9, 8
CALLS = frozenset({"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod"})


def run_and_kill(action: Callable[[], object], num_calls: int) -> int:
    """How a child process ended that died if it made one more call on the file system than so many."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    left = num_calls

    def die(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        left -= event in CALLS
        if left < 0:
            os._exit(KILLED)

    sys.addaudithook(die)
    try:
        action()
    except BaseException:
        os._exit(REFUSED)
    os._exit(0)
