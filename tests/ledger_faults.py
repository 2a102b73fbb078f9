"""What can befall a ledger's file, for the tests of every kind of ledger: a kill in the middle of appends, a full disk."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

KILL_AFTER_S = (0.0, 0.003, 0.011, 0.02)

# A script that appends for ever begins with this, and calls `acknowledge` with the number of appends that have returned.
ACKNOWLEDGE = """
import sys
def acknowledge(number):
    sys.stdout.write(f"{number}\\n")
    sys.stdout.flush()
"""

# A twin begins with this: writes stay in memory, as if nobody had waited for the disk.
KEEP_IN_MEMORY = """
import os
os.write = lambda descriptor, data: len(data)
"""

# A script that runs out of space begins with this: `leave_room` refuses what makes a file longer by more than `room`.
LEAVE_ROOM = """
import resource
def leave_room(path, room):
    size = path.stat().st_size if room is not None else 0
    limit = resource.RLIM_INFINITY if room is None else size + room
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
"""


def output_of(script: str, path: Path) -> list[str]:
    """The lines that a script prints in a process of its own, with the ledger's path as its argument."""
    answer = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    return answer.stdout.splitlines()


def last_acknowledged(script: str, path: Path, kill_after_s: float) -> int:
    """Start a script that appends for ever, kill it, and say which append it acknowledged last (0: none was heard)."""
    with subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        time.sleep(kill_after_s)  # the moment of the kill, not a wait for anything
        os.kill(process.pid, signal.SIGKILL)
        heard = (first + process.stdout.read()).split(b"\n")[:-1]
    return int(heard[-1]) if heard else 0
