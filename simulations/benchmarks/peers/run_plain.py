"""The peers' work in bare torch: python run_plain.py KIND [NOISE_MULTIPLIER]. Prints JSON."""

import json
import sys
import time

import torch
from plain_loop import PlainLoop
from workloads import WORKLOADS, cohorts, evaluate, make_data, make_model

if __name__ == "__main__":
    kind, noise_multiplier = sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else 0.5
    torch.set_num_threads(1)
    devices, test = make_data(kind)
    loop = PlainLoop(kind, make_model(kind), devices, noise_multiplier)
    torch.manual_seed(3)
    cpu, wall = [], []
    for cohort in cohorts(kind):
        started, began = time.process_time(), time.perf_counter()
        loop.round(cohort)
        cpu.append((time.process_time() - started) / WORKLOADS[kind].cohort_size)
        wall.append((time.perf_counter() - began) / WORKLOADS[kind].cohort_size)
    print(json.dumps({"cpu_s": cpu, "wall_s": wall, "start_s": 0.0, "loss": evaluate(kind, loop.model, test)}))
