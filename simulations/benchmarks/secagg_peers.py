"""What others' software costs on this machine: Flower's SecAgg+ for a round, OpenDP's sampler for a million draws."""

import dataclasses
import math
import time

import opendp.prelude as dp
import typer
from flower_secagg import time_secagg_plus


def time_opendp(variance: int, num_draws: int = 20_000) -> float:
    """CPU seconds that OpenDP's discrete Gaussian takes for a million coordinates, from fewer draws."""
    dp.enable_features("contrib")
    space = dp.vector_domain(dp.atom_domain(T=dp.i64)), dp.l2_distance(T=dp.f64)
    add_noise = dp.m.make_gaussian(*space, scale=math.sqrt(variance))
    zeros = [0] * num_draws
    start = time.process_time()
    add_noise(zeros)
    return (time.process_time() - start) * 1e6 / num_draws


def main(devices: int = 5, numbers: int = 1_000_000, variance: int = 2556**2) -> None:
    """Print a table: SecAgg+ for so many DEVICES and NUMBERS each, and OpenDP's noise of this VARIANCE."""
    cost = time_secagg_plus(devices, numbers)
    rows = dataclasses.asdict(cost) | {"opendp_s_per_million": time_opendp(variance)}
    print(f"| {devices} devices, {numbers:,} numbers each | measured |\n|---|---|")
    for name, value in rows.items():
        print(f"| {name} | {value:,.3f} |" if isinstance(value, float) else f"| {name} | {value:,} |")


if __name__ == "__main__":
    typer.run(main)
