"""What whole simulations of a tiny model cost: python run_measures.py COHORT_SIZE NUM_ROUNDS CONFIG, each a process.

Prints JSON: seconds from the process's start to the end of its first round, seconds a device in the later rounds, and the
most memory it held. The model and the people are those of the tests.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def since_start() -> float:
    """Wall seconds since this process was started, to 10 ms."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    ticks = int(fields[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return uptime - ticks / os.sysconf("SC_CLK_TCK")


def main(cohort_size: int, num_rounds: int, config_path: str) -> None:
    from fedmini import config as configuration
    from fedmini import simulation
    from fedmini.model import runtime

    moments: list[tuple[int, float, float]] = []  # round, wall seconds since the start, CPU seconds

    def on_progress(progress: simulation.Progress) -> None:
        if progress.stage == "round" and progress.device_index == 0:
            moments.append((progress.round_num, since_start(), time.process_time()))

    config = configuration.load_run_config(Path(config_path))
    with tempfile.TemporaryDirectory(prefix="fedmini-bench-") as folder:
        options = simulation.SimulationOptions(on_progress=on_progress)
        simulation.simulate(config, output=Path(folder) / "run", options=options)
    ends = {round_num: (wall, cpu) for round_num, wall, cpu in reversed(moments)}
    later = [(ends[one][1] - ends[one - 1][1]) / cohort_size for one in range(2, num_rounds + 1)]
    found = {
        "first_round_s": ends[1][0],
        "first_round_cpu_s": ends[1][1],
        "cpu_s_a_device": later,
        "peak_mb": runtime.peak_memory_bytes() / 2**20,
    }
    print(json.dumps(found))


def write_config(folder: Path, cohort_size: int, num_rounds: int) -> Path:
    """The file of a run of so many devices."""
    from fedmini import config as configuration
    from tests import tiny_run

    people = folder / "people.jsonl"
    people.write_text("".join(json.dumps(row) + "\n" for row in tiny_run.rows(cohort_size + 2)))
    rounds = {"num_rounds": num_rounds, "cohort_size": cohort_size, "min_survivors": cohort_size}
    changes = {"data": {"source": str(people)}, "rounds": rounds, "simulation": {"num_threads": 1, "workers": 1}}
    config = tiny_run.config(folder, "example-shared", changes)
    path = folder / "run.toml"
    path.write_text(configuration.dump_run_config(config))
    return path


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
