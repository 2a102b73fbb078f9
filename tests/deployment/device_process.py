"""A device in a process of its own, as an app would embed it. Its settings come from tests/deployment/deployed.py.

Its randomness is injected, its conditions always hold. It prints one JSON line for each event of its log.
"""

import gc
import os
import signal
import sys
from pathlib import Path

from fedmini import events
from fedmini.conditions import Conditions
from fedmini.device import Device, worker
from fedmini.ending import Ending
from fedmini.flower import gate
from fedmini.randomness import FROM_OS, Randomness
from tests.deployment import seeded


class AlwaysGood:
    """A device that is plugged in, idle, online for free, and cool."""

    def read(self) -> Conditions:
        return Conditions(on_power=True, is_idle=True, is_unmetered=True, temperature_c=30.0, free_memory_bytes=2**34)


def main(settings: dict) -> None:
    gate.end_with(os.getppid())
    worker.LONGEST_WAIT_SECONDS = 2.0  # the servers of these tests come and go
    emit = events.to_stream(sys.stdout, "json", settings["name"])
    ended = Ending()
    ended.listen(signal.SIGTERM)
    randomness = Randomness(seeded.streams, is_seeded=True) if settings["seeded"] else FROM_OS
    die_at = settings.get("die_at")

    def watched(event: str, /, **fields) -> None:
        emit(event, **fields)
        if event == "device.answering" and fields["stage"] == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    device = Device(
        Path(settings["folder"]),
        settings["server"],
        settings["server_key"],
        conditions=AlwaysGood(),
        emit=watched,
        randomness=randomness,
    )
    with device:
        device.start()
        emit("process.ready")
        ended.wait()
    gc.freeze()  # the interpreter's last collection takes more than a second, and gives nothing back that its end does not
