"""The peers' work in Apple's pfl: python run_pfl.py KIND [EPSILON]. Epsilon 0 clips only. Prints JSON."""

import json
import sys
import time
import types
from typing import Any

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByUser
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from pfl.privacy import (
    CentrallyAppliedPrivacyMechanism,
    GaussianMechanism,
    NormClippingOnly,
    PLDPrivacyAccountant,
)
from workloads import WORKLOADS, cohorts, evaluate, loss_of, make_data, make_model

NEVER = 10**9


class RoundTimes(TrainingProcessCallback):
    """CPU and wall seconds of each round."""

    def __init__(self) -> None:
        self.cpu: list[float] = []
        self.wall: list[float] = []
        self._last = (0.0, 0.0)

    def on_train_begin(self, *, model: Any) -> Metrics:
        self._last = (time.process_time(), time.perf_counter())
        return Metrics()

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: Any, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        now = (time.process_time(), time.perf_counter())
        self.cpu.append(now[0] - self._last[0])
        self.wall.append(now[1] - self._last[1])
        self._last = now
        return False, Metrics()


def a_mechanism(kind: str, epsilon: float) -> Any:
    work = WORKLOADS[kind]
    if epsilon == 0:
        return NormClippingOnly(2, work.clip_norm)
    accountant = PLDPrivacyAccountant(
        num_compositions=work.num_rounds,
        sampling_probability=1e-3,
        mechanism="gaussian",
        epsilon=epsilon,
        delta=1e-6,
        noise_scale=work.cohort_size / 1000,
    )
    return GaussianMechanism.from_privacy_accountant(accountant=accountant, clipping_bound=work.clip_norm)


def _teach(network: torch.nn.Module, kind: str) -> None:
    """Give a network the two methods that pfl asks for."""

    def loss(self: torch.nn.Module, inputs: torch.Tensor, labels: torch.Tensor, eval: bool = False) -> torch.Tensor:
        return loss_of(kind, self, inputs, labels)

    def metrics(self: torch.nn.Module, *examples: torch.Tensor, **_: bool) -> dict[str, Weighted]:
        count = len(examples[0])
        return {"loss": Weighted(float(loss_of(kind, self, *examples)) * count, count)}

    network.loss, network.metrics = types.MethodType(loss, network), types.MethodType(metrics, network)


def main(kind: str, epsilon: float) -> None:
    torch.set_num_threads(1)
    work, network = WORKLOADS[kind], make_model(kind)
    devices, test = make_data(kind)

    _teach(network, kind)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    model = PyTorchModel(
        model=network, local_optimizer_create=torch.optim.SGD, central_optimizer=torch.optim.SGD(trained, 1.0)
    )
    datasets = [Dataset(raw_data=list(examples), user_id=str(index)) for index, examples in enumerate(devices)]
    order = iter([device for cohort in cohorts(kind) for device in cohort])
    federated = FederatedDataset(make_dataset_fn=datasets.__getitem__, user_sampler=lambda: next(order, 0))
    started = time.perf_counter()
    mechanism = a_mechanism(kind, epsilon)
    start_s, times = time.perf_counter() - started, RoundTimes()
    private = CentrallyAppliedPrivacyMechanism(mechanism)
    backend = SimulatedBackend(training_data=federated, val_data=None, postprocessors=[WeightByUser(), private])
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=work.num_rounds,
            evaluation_frequency=NEVER,
            train_cohort_size=work.cohort_size,
            val_cohort_size=0,
        ),
        backend=backend,
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=work.learning_rate, local_batch_size=work.batch_size
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=None),
        callbacks=[times],
    )
    each = {
        "cpu_s": [seconds / work.cohort_size for seconds in times.cpu],
        "wall_s": [seconds / work.cohort_size for seconds in times.wall],
    }
    print(json.dumps({**each, "start_s": start_s, "loss": evaluate(kind, network, test)}))


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else 0.0)
