"""The peers' work in Flower's simulation engine: python run_flower.py KIND [ROUNDS]. Prints JSON; its CPU is not counted.

FedAvg with central noise and fixed clipping. Ray's workers are processes of their own: only wall seconds are known.
"""

import json
import logging
import os
import sys
import time
from functools import cache

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg
from flwr.simulation import run_simulation
from workloads import WORKLOADS, Examples, evaluate, loss_of, make_data, make_model

client, server = ClientApp(), ServerApp()


@cache
def loaded(kind: str) -> tuple[torch.nn.Module, tuple[list[Examples], Examples]]:
    torch.set_num_threads(1)
    return make_model(kind), make_data(kind)


def trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: one.detach() for name, one in model.named_parameters() if one.requires_grad}


@client.train()
def train(message: Message, context: Context) -> Message:
    kind = str(message.content["config"]["kind"])
    (model, (devices, _)), work = loaded(kind), WORKLOADS[kind]
    inputs, labels = devices[int(context.node_config["partition-id"])]
    model.load_state_dict(message.content["arrays"].to_torch_state_dict(), strict=False)
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=work.learning_rate)
    for start in range(0, len(inputs), work.batch_size):
        batch = slice(start, start + work.batch_size)
        optimizer.zero_grad(set_to_none=True)
        loss_of(kind, model, inputs[batch], labels[batch]).backward()
        optimizer.step()
    metrics = MetricRecord({"num-examples": len(inputs)})
    return Message(RecordDict({"arrays": ArrayRecord(trained(model)), "metrics": metrics}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    kind, num_rounds = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 4
    (model, (_, test)), work = loaded(kind), WORKLOADS[kind]
    averaging = FedAvg(
        fraction_train=work.cohort_size / work.num_devices,
        fraction_evaluate=0.0,
        min_train_nodes=work.cohort_size,
        min_available_nodes=work.num_devices,
    )
    private = DifferentialPrivacyServerSideFixedClipping(averaging, 0.0106, work.clip_norm, work.cohort_size)
    moments: list[float] = []
    result = private.start(
        grid=grid,
        initial_arrays=ArrayRecord(trained(model)),
        train_config=ConfigRecord({"kind": kind}),
        num_rounds=num_rounds,
        evaluate_fn=lambda round_num, arrays: moments.append(time.perf_counter()),
    )
    model.load_state_dict(result.arrays.to_torch_state_dict(), strict=False)
    seconds = np.diff(moments)
    each = [float(one) / work.cohort_size for one in seconds[1:]]
    found = {"cpu_s": [], "wall_s": each, "start_s": float(seconds[0]), "loss": evaluate(kind, model, test)}
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    logging.getLogger("flwr").setLevel(logging.ERROR)
    run_simulation(
        server_app=server,
        client_app=client,
        num_supernodes=WORKLOADS[sys.argv[1]].num_devices,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )
