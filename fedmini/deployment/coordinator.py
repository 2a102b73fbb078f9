"""The coordinator's process: the rounds of one run, between the devices that the gate lets in and the run's folder.

`python -m fedmini.deployment.coordinator DIR RUN LOCAL_PORT [PARENT]`, as the supervisor starts it. It logs JSON lines on
stderr, and ends with its parent, the process PARENT.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeAlias

from fedmini import events, run_history, server_folder
from fedmini.deployment import run_files
from fedmini.deployment.roll_call import RollCall
from fedmini.deployment.run_files import RunFiles
from fedmini.deployment.served_run import ServedRun, ServedRunParts
from fedmini.deployment.server_model import initial_adapter
from fedmini.deployment.status import StatusFile
from fedmini.errors import FedMiniError, LinkError
from fedmini.events import Emit
from fedmini.flower import gate
from fedmini.flower.loopback_token import HEADER
from fedmini.flower.server_link import ServerLink
from fedmini.randomness import FROM_OS, Randomness
from fedmini.server_folder import ServerFolder
from fedmini.types import Manifest

LINK_SECONDS = 60.0  # for the gate to come back
STATE, LOCKED = "state", "coordinator"
ENDED_EARLY = 128 + signal.SIGTERM  # not 0: the run is not over


Connect: TypeAlias = Callable[[ServerFolder, RunFiles], tuple[ServerLink, RollCall]]
"""How a run reaches its devices: the link that is not begun yet, and who is there."""


def serve_run(path: Path, name: str, local_port: int, emit: Emit, randomness: Randomness = FROM_OS) -> None:
    """Serve a run behind the gate to its end, from wherever it stands. Raises a FedMiniError; what was committed is saved."""

    def connect(folder: ServerFolder, files: RunFiles) -> tuple[ServerLink, RollCall]:
        link = ServerLink(local_port, {HEADER: folder.token}, max_payload_bytes(files.manifest))
        return link, RollCall(folder, local_port, link, files.signed, emit)

    server_folder.opened(path)  # says what a folder is not, before anything is made in it
    with gate.locked(path / STATE / LOCKED, gate.LOCK_SECONDS):
        serve_over(connect, path, name, emit, randomness)


def serve_over(connect: Connect, path: Path, name: str, emit: Emit, randomness: Randomness = FROM_OS) -> None:
    """The same, however its devices are reached."""
    folder = server_folder.opened(path)
    files = run_files.open_run(folder.run_folder(name), folder.trust)
    status = StatusFile(path / STATE)
    run_history.check_saved_together(files.directory)
    with run_history.opened_ledgers(files.directory, files.manifest) as (ledger, evaluation_ledger):
        run_files.begin(files)
        state, history = run_history.starting_point(
            files.manifest, lambda: initial_adapter(files.manifest), files.directory, ledger, evaluation_ledger
        )
        status.write_standing(files.manifest, state.round_num, history[-1] if history else {}, "starting")
        link, roll = connect(folder, files)
        try:
            _begin(link, status)
            emit("run.began", run=files.manifest.run_id, round=state.round_num, rounds=files.manifest.num_rounds)
            parts = ServedRunParts(
                files=files,
                link=link,
                roll=roll,
                timing=folder.config.timing,
                streams=randomness.streams,
                is_seeded=randomness.is_seeded,
                status=status,
                emit=emit,
            )
            ServedRun(parts, ledger, state, history, evaluation_ledger).run()
            link.end()
        finally:
            link.close()


def _begin(link: ServerLink, status: StatusFile) -> None:
    """Begin a run of Flower's, and end the one that an earlier process left: its messages must reach nobody any more."""
    until = time.monotonic() + LINK_SECONDS
    while True:
        try:
            status.remember_link(link.begin(status.previous_link()))
            return
        except LinkError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)


def max_payload_bytes(manifest: Manifest) -> int:
    """The largest answer that a device may send: a tenth more than its vector takes, and its shares."""
    release = manifest.release
    vector = manifest.num_coordinates * release.modulus_bits // 8
    return int(1.1 * vector) + 1024 * release.max_devices + 2**16


def run_process(arguments: list[str], randomness: Randomness) -> int:
    """What the process does; its exit code: 0 where the run is over, 2 where somebody has to do something first."""
    if len(arguments) not in (3, 4) or not all(one.isdecimal() for one in arguments[2:]):
        print("usage: python -m fedmini.deployment.coordinator DIR RUN LOCAL_PORT [PARENT]", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, end_early)
    gate.end_with(int(arguments[3]) if len(arguments) == 4 else os.getppid())
    emit = events.to_stream(sys.stderr, "json", "coordinator")
    try:
        serve_run(Path(arguments[0]), arguments[1], int(arguments[2]), emit, randomness)
    except FedMiniError as error:
        emit("run.stopped", kind=type(error).__name__, reason=str(error))
        return 3 if isinstance(error, LinkError) else 2
    return 0


def end_early(*_: object) -> NoReturn:
    """End this process, as one that is to be started again unless its parent ends too; a signal handler."""
    raise SystemExit(ENDED_EARLY)


if __name__ == "__main__":
    sys.exit(run_process(sys.argv[1:], FROM_OS))
