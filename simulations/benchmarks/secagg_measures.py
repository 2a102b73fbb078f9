"""What simulations/bench_secagg.py measures: CPU seconds are those of one process, medians of several rounds."""

import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from secagg_cohort import Cohort, Costs

from fedmini.privacy.noise import RandomStream, discrete_gaussian

Row = tuple[str, str, str, str]  # what, measured, what it is held against, the bound


def round_of_a_hundred(repeats: int) -> list[Row]:
    """184,320 coordinates and the metrics, 100 devices, 20 of which send no vector."""
    found: list[Costs] = []
    for _ in range(repeats):
        cohort = Cohort(100, 184_324)
        found.append(cohort.run(lost=cohort.devices[::5]))
    device = statistics.median(seconds for costs in found for seconds in costs.device_s.values())
    server = statistics.median(costs.server_s for costs in found)
    upload, download = max(found[0].upload_bytes.values()), max(found[0].download_bytes.values())
    flower = 8 * 184_324
    return [
        (
            "upload of a device, all stages",
            f"{upload / 1e6:.3f} MB",
            f"SecAgg+: {flower / 1e6:.2f} MB for the vector alone",
            "0.60 MB",
        ),
        ("download of a device beside the model", f"{download / 1e6:.3f} MB", "", ""),
        ("CPU of a device", f"{1e3 * device:.0f} ms", "", "100 ms"),
        ("CPU of the server, 20 dropped", f"{server:.2f} s", "", "2 s"),
    ]


def against_flower(num_devices: int, repeats: int) -> Row:
    """A million numbers each, nobody drops, ours and Flower's in turn; all devices and the server, encoding included."""
    from flower_secagg import time_secagg_plus

    ours, theirs = [], []
    for _ in range(repeats):
        cohort = Cohort(num_devices, 1_000_000)
        costs = cohort.run(lost=())
        ours.append(costs.server_s + sum(costs.device_s.values()))
        cost = time_secagg_plus(num_devices, 1_000_000)
        theirs.append(cost.devices_s + cost.server_s + cost.encoding_s)
    own, flower = statistics.median(ours), statistics.median(theirs)
    what = f"CPU of {num_devices} devices and the server, a million numbers"
    return (what, f"{own:.3f} s", f"SecAgg+: {flower:.2f} s, {flower / own:.1f} times as much", "20 times")


def noise(repeats: int) -> Row:
    """A million coordinates of the demo's noise share."""
    from secagg_peers import time_opendp

    seconds = []
    for _ in range(repeats):
        started = time.process_time()
        discrete_gaussian(2556**2, 1_000_000, RandomStream.from_os())
        seconds.append(time.process_time() - started)
    ours, theirs = statistics.median(seconds), time_opendp(2556**2)
    return ("discrete Gaussian noise, a million", f"{ours:.3f} s", f"OpenDP: {theirs:.1f} s", "4 s")


def large_round() -> list[Row]:
    """The whole protocol in this process: 150 devices, 15 of which drop, 50,000 coordinates."""
    cohort = Cohort(150, 50_000)
    before, started = _peak_mb(), time.perf_counter()
    cohort.run(lost=cohort.devices[::10])
    seconds, grown = time.perf_counter() - started, _peak_mb() - before
    what = "150 devices, 15 dropped, 50,000 coordinates, one process"
    return [(what, f"{seconds:.1f} s", "", "1 or 2 min"), ("memory that this took", f"{grown:.0f} MB", "", "flat")]


def server_memory() -> list[Row]:
    """Peak memory of the server alone, its devices elsewhere, for 10 and for 150 devices of 200,000 coordinates."""
    script = Path(__file__).with_name("secagg_memory.py")
    few, many = (
        float(
            subprocess.run(
                [sys.executable, str(script), size, "200000"], capture_output=True, text=True, check=True
            ).stdout
        )
        for size in ("10", "150")
    )
    grown = f"{many - few:.1f} MB"
    return [("memory of the server, 150 devices against 10", grown, f"{many:.0f} MB against {few:.0f} MB", "10 MB")]


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
