"""The server's memory for one round, its devices in a process of their own: python secagg_memory.py DEVICES NUMBERS."""

import multiprocessing
import sys
from multiprocessing.connection import Connection
from pathlib import Path

from secagg_cohort import Cohort

from fedmini.types import DeviceId


def main(num_devices: int, num_coordinates: int) -> None:
    """Print the peak resident memory of this process, which is the server's alone, in MB."""
    cohort = Cohort(num_devices, num_coordinates)
    ours, theirs = multiprocessing.Pipe()
    devices = multiprocessing.get_context("fork").Process(target=serve, args=(cohort, theirs, ours))
    devices.start()
    theirs.close()

    def ask(device: DeviceId, request: bytes) -> bytes:
        ours.send((device, request))
        return ours.recv_bytes()

    cohort.run(lost=cohort.devices[: num_devices // 10], answer=ask)
    ours.close()
    devices.join()
    status = Path("/proc/self/status").read_text()  # getrusage would count what this process was before it was this one
    print(int(status.split("VmHWM:")[1].split()[0]) / 1024)


def serve(cohort: Cohort, connection: Connection, other_end: Connection) -> None:
    """The devices' process. It closes the server's end, so that it notices when the server has closed it too."""
    other_end.close()
    cohort.serve(connection)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
