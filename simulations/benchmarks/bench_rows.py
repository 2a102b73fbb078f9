"""The rows of `fedmini bench`: what each measures, beside what, and the number to reach.

A row is measured in a process of its own: python bench_rows.py ROW REPEATS QUICK PEERS AGAINST prints its lines as JSON. It
ends with 2, and says why, where it can't be measured as this machine is set up.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
sys.path[:0] = [str(FOLDER), str(ROOT)]
REFUSED = 2  # a row's exit code where something that it needs is missing
NEEDS_PEERS = ("nf4", "peers")


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the table. A spread is the median and the middle half's ends; of one value, that alone."""

    what: str
    unit: str  # "" for a ratio
    cpu: tuple[float, ...] | None
    wall: tuple[float, ...] | None
    to_reach: float | None
    decided_by: str = "cpu"  # which of the two has to reach it

    @property
    def is_reached(self) -> bool | None:
        decisive = self.cpu if self.decided_by == "cpu" else self.wall
        return None if self.to_reach is None or decisive is None else decisive[0] <= self.to_reach


@dataclass(frozen=True, slots=True)
class Asked:
    """How much is measured."""

    repeats: int
    quick: bool
    peers: Path
    against: Path | None  # another checkout, whose demo is measured too


def spread(values: Sequence[float]) -> tuple[float, ...]:
    if len(values) < 2:
        return tuple(values)
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, ...]:
    """Of each turn's own two times."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])


def private_step(asked: Asked) -> list[Line]:
    import linear_measures
    import step_measures

    from fedmini.model import runtime

    size = (4, 64) if asked.quick else (8, 128)
    work = step_measures.steps(runtime.default_cache_dir(), *size)
    cpu, wall = linear_measures.measure(work, asked.repeats)
    shape = f"{size[0]} x {size[1]} tokens"
    return [
        Line(f"{what}, {shape}", "", ratio(cpu[ours], cpu[theirs]), ratio(wall[ours], wall[theirs]), to_reach)
        for what, ours, theirs, to_reach in (
            ("a device's private step, noise local / the same without privacy", "private", "plain", 1.02),
            ("a device's private step, noise shared / the same without privacy", "shared", "plain", 1.02),
            ("our gradients with Opacus's optimizer / the same without privacy", "opacus", "plain", None),
            ("private step on 4 bits / default transformers + PEFT bf16 without privacy", "private", "default", 0.75),
            ("the same step without privacy on 4 bits / on dense bf16, compiled kernels", "plain", "dense", 1.03),
            (
                "the same step without privacy on 4 bits / on dense bf16, plain torch",
                "plain, torch",
                "dense, torch",
                1.12,
            ),
            ("Opacus hooks on dense bf16 / default without privacy", "hooks", "default", None),
            ("Opacus ghost clipping on dense bf16 / default without privacy", "ghost", "default", None),
        )
    ]


def linear(asked: Asked) -> list[Line]:
    import linear_measures
    import torch

    from fedmini.model import compiling, native, runtime

    torch.set_num_threads(1)
    kernel = native.Kernel(compiling.library(runtime.default_cache_dir(), print))
    generator = torch.Generator().manual_seed(0)
    packed = linear_measures.packed_layers("Q4_1", generator)
    dense = linear_measures.dense_layers(packed, torch.bfloat16)
    x = torch.randn((128 if asked.quick else 1024, linear_measures.HIDDEN), generator=generator).bfloat16()
    work = {
        "dense": lambda: linear_measures.step(dense, x),
        "C++": linear_measures.with_kernel(kernel, lambda: linear_measures.step(packed, x)),
        "torch": linear_measures.with_kernel(None, lambda: linear_measures.step(packed, x)),
    }
    cpu, wall = linear_measures.measure(work, asked.repeats)
    return [
        Line(
            f"210 linear layers of Q4_1 in {name} / dense bf16, {len(x)} tokens",
            "",
            ratio(cpu[name], cpu["dense"]),
            ratio(wall[name], wall["dense"]),
            None,
        )
        for name in ("C++", "torch")
    ]


def device(asked: Asked) -> list[Line]:
    with tempfile.TemporaryDirectory(prefix="fedmini-bench-") as folder:
        saved = Path(folder) / "device.json"
        _run([sys.executable, str(FOLDER / "device_memory.py"), "--save", str(saved), "--rounds", "1"])
        found = json.loads(saved.read_text())
    trained = next(one for one in found["moments"] if one["event"] == "asked: UNMASK")  # the first thing after its step
    what = f"device, {found['shape']['batch']} x {found['shape']['tokens']} tokens, all linear layers"
    return [
        Line(
            f"{what}: peak resident memory",
            "MB",
            None,
            (max(one["peak_mb"] for one in found["moments"]),),
            950.0,
            "wall",
        ),
        Line(f"{what}: start to the end of a step", "s", (trained["cpu_s"],), (trained["wall_s"],), 8.0, "wall"),
    ]


def cohort(asked: Asked) -> list[Line]:
    import cohort_measures
    import torch

    from fedmini.model import runtime

    torch.set_num_threads(1)
    ways = ("bare", "alone", "together")
    workload = cohort_measures.Workload(num_devices=4 if asked.quick else 16)
    small = cohort_measures.smollm2(runtime.default_cache_dir(), workload, asked.repeats, ways)
    lines = []
    for what, found in (
        (f"{workload.num_devices} devices of 2 x 32 tokens, SmolLM2", small),
        ("peers' lora, float32", cohort_measures.peers_lora(asked.repeats, ways, torch.float32)),
        ("peers' lora, bf16", cohort_measures.peers_lora(asked.repeats, ways, torch.bfloat16)),
    ):
        together = ratio(found["together"], found["bare"])
        to_reach = None if what.endswith("float32") else 0.60
        lines.append(Line(f"{what}: together / one after the other in bare torch", "", together, None, to_reach))
        alone = ratio(found["alone"], found["bare"])
        lines.append(Line(f"{what}: one after the other here / in bare torch", "", alone, None, None))
    return lines


def toy(asked: Asked) -> list[Line]:
    import toy_rounds

    found, accountant = toy_rounds.measure(asked.repeats, 2 if asked.quick else 5)

    def over(ours: Sequence[float], bare: Sequence[float]) -> tuple[float, ...]:
        return spread([1e3 * (a - b) for a, b in zip(ours, bare, strict=True)])

    (own, own_wall), (bare, bare_wall) = found["fedmini"], found["bare"]
    return [
        Line("peers' mlp: fedmini's own part of a client-round", "ms", over(own, bare), over(own_wall, bare_wall), 0.3),
        Line("peers' mlp: a client-round of the bare loop", "ms", spread([1e3 * one for one in bare]), None, None),
        Line("peers' mlp: the accountant, once for the run", "s", (accountant,), None, None),
    ]


def peers(asked: Asked) -> list[Line]:
    lines = []
    for kind in ("mlp", "lora"):
        bare = _peer(asked, "torch", "run_plain.py", kind)
        best = min(bare["cpu_s"]), min(bare["wall_s"])
        pfl = _peer(asked, "pfl", "run_pfl.py", kind)
        flower = _peer(asked, "flower", "run_flower.py", kind, "3")
        first = (flower["start_s"],)
        lines += [
            Line(f"{kind}: pfl / bare torch, best round", "", (min(pfl["cpu_s"]) / best[0],), None, None),
            Line(f"{kind}: pfl's own part of a client-round", "ms", (1e3 * (min(pfl["cpu_s"]) - best[0]),), None, None),
            Line(f"{kind}: Flower / bare torch, best round", "", None, (min(flower["wall_s"]) / best[1],), None),
            Line(f"{kind}: Flower's first round", "s", None, first, None),
        ]
    calibrated = _peer(asked, "pfl", "run_pfl.py", "mlp", "2.0")
    return [*lines, Line("pfl's calibration before the first round", "s", None, (calibrated["start_s"],), None)]


def nf4(asked: Asked) -> list[Line]:
    num_tokens = 128 if asked.quick else 1024
    found = _peer(asked, "torch", "run_nf4.py", str(asked.repeats), str(num_tokens))
    (cpu, cpu_dense), (wall, wall_dense) = ((found[key]["nf4"], found[key]["dense"]) for key in ("cpu_s", "wall_s"))
    what = f"210 linear layers in bitsandbytes' NF4 / dense bf16, {num_tokens} tokens"
    return [Line(what, "", ratio(cpu, cpu_dense), ratio(wall, wall_dense), None)]


def start(asked: Asked) -> list[Line]:
    found = [_simulation(10, 1) for _ in range(1 if asked.quick else 3)]
    cpu = spread([one["first_round_cpu_s"] for one in found])
    wall = spread([one["first_round_s"] for one in found])
    return [Line("process start to the end of a tiny simulation's first round", "s", cpu, wall, 3.0, "wall")]


def growth(asked: Asked) -> list[Line]:
    sizes = (10, 100) if asked.quick else (10, 100, 1000)
    found = {size: _simulation(size, 3) for size in sizes}
    least, most = found[sizes[0]], found[sizes[-1]]
    each = {size: statistics.median(one["cpu_s_a_device"]) for size, one in found.items()}
    memory = most["peak_mb"] - least["peak_mb"]
    lines = [Line(f"a device of a cohort of {size}", "ms", (1e3 * each[size],), None, None) for size in sizes]
    grown = each[sizes[-1]] / each[sizes[0]]
    return [
        *lines,
        Line(f"a device's time, cohort of {sizes[-1]} / of {sizes[0]}", "", (grown,), None, 1.10),
        Line(f"peak memory, cohort of {sizes[-1]} over {sizes[0]}", "MB", (memory,), None, 20.0),
    ]


def demo(asked: Asked) -> list[Line]:
    import demo_measures

    what = "the demo, cut down to two rounds of four"
    if asked.against is None:
        cpu, wall = demo_measures.seconds(ROOT, _run)
        return [Line(what, "s", (cpu,), (wall,), None)]
    (cpu, wall), (cpu_there, wall_there) = demo_measures.in_turn((ROOT, asked.against), asked.repeats, _run)
    there = demo_measures.revision(asked.against)
    over_cpu, over_wall = (
        (statistics.median(a) / statistics.median(b),) for a, b in ((cpu, cpu_there), (wall, wall_there))
    )
    return [
        Line(what, "s", spread(cpu), spread(wall), None),
        Line(f"{what}: {there}", "s", spread(cpu_there), spread(wall_there), None),
        Line(f"{what}: here / {there}, of medians", "", over_cpu, over_wall, None),
    ]


def _simulation(cohort_size: int, num_rounds: int) -> dict[str, Any]:
    import run_measures

    with tempfile.TemporaryDirectory(prefix="fedmini-bench-") as folder:
        path = run_measures.write_config(Path(folder), cohort_size, num_rounds)
        script = [sys.executable, str(FOLDER / "run_measures.py"), str(cohort_size), str(num_rounds), str(path)]
        return json.loads(_run(script).splitlines()[-1])


def _peer(asked: Asked, environment: str, script: str, *arguments: str) -> dict[str, Any]:
    python = asked.peers / environment / "bin" / "python"
    if not python.exists():
        print(f"no {python}: simulations/benchmarks/make_peers.sh {asked.peers} installs the peers", file=sys.stderr)
        raise SystemExit(REFUSED)
    command = [str(python), str(FOLDER / "peers" / script), *arguments]
    return json.loads(_run(command, tree=None).splitlines()[-1])


def _run(command: Sequence[str], tree: Path | None = ROOT) -> str:
    """What a process prints, with the code of a checkout, or of none; its own complaint where it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if tree is not None:
        environment["PYTHONPATH"] = str(tree)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tree)
    if done.returncode:
        raise SystemExit(f"{Path(command[1]).name} ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    return done.stdout


ROWS: Mapping[str, Callable[[Asked], list[Line]]] = {
    "step": private_step,
    "linear": linear,
    "device": device,
    "cohort": cohort,
    "toy": toy,
    "start": start,
    "growth": growth,
    "demo": demo,
    "nf4": nf4,
    "peers": peers,
}

if __name__ == "__main__":
    row, repeats, quick, folder, against = sys.argv[1:]
    lines = ROWS[row](Asked(int(repeats), quick == "quick", Path(folder), Path(against) if against else None))
    print(json.dumps([asdict(line) | {"is_reached": line.is_reached} for line in lines]))
