"""One round of Flower's own secure aggregation, SecAgg+, exactly as installed, and what it costs."""

import logging
import time
from dataclasses import dataclass
from typing import cast

import numpy as np
from flower_network import Network, TrainedDevice
from flwr.app import ArrayRecord, ConfigRecord, Context, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.server import LegacyContext, SimpleClientManager
from flwr.server.compat.grid_client_proxy import GridClientProxy
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity


@dataclass(frozen=True, slots=True)
class SecAggCost:
    """CPU seconds of a round: all devices together, the server, protobuf on both sides. Bytes: of one device."""

    devices_s: float
    server_s: float
    encoding_s: float
    upload_bytes: int
    download_bytes: int


def time_secagg_plus(num_devices: int, num_numbers: int) -> SecAggCost:
    """What SecAgg+ costs where 4 to 1000 devices, each the others' neighbour, sum so many float32, without dropouts.

    The server's part is SecAggPlusWorkflow with its default ranges, n shares and a threshold of floor(2 n / 3) + 1.
    RuntimeError where its result is not the mean of the devices' vectors, up to its own rounding of 16 / 2**22.
    """
    generator = np.random.default_rng(num_devices)
    vectors = [generator.uniform(-1, 1, num_numbers).astype(np.float32) for _ in range(num_devices)]
    network = Network([TrainedDevice(vector, num_examples=1000) for vector in vectors], [secaggplus_mod])
    grid = cast(Grid, network)
    context = _make_server_context(grid, num_devices, ArrayRecord([np.zeros(num_numbers, np.float32)]))
    start = time.process_time()
    SecAggPlusWorkflow(num_devices, 2 * num_devices // 3 + 1)(grid, context)
    server_s = time.process_time() - start - network.devices_s - network.encoding_s
    (mean,) = context.state.array_records["parameters"].to_numpy_ndarrays()
    error = np.abs(mean - np.mean(vectors, axis=0, dtype=np.float64)).max()
    if not error < 1e-5:
        raise RuntimeError(f"SecAgg+ should have given the mean of {num_devices} vectors, and is {error} off")
    num_bytes = (network.upload_bytes // num_devices, network.download_bytes // num_devices)
    return SecAggCost(network.devices_s, server_s, network.encoding_s, *num_bytes)


def _make_server_context(grid: Grid, num_devices: int, model: ArrayRecord) -> LegacyContext:
    logging.getLogger("flwr").setLevel(logging.ERROR)
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 1  # Flower's launcher sets these
    clients = SimpleClientManager()
    for node_id in range(1, num_devices + 1):
        clients.register(GridClientProxy(node_id, grid, run_id=1))
    state = RecordDict({"config": ConfigRecord({"current_round": 1}), "parameters": model})
    return LegacyContext(Context(1, 0, {}, state, {}), client_manager=clients)
