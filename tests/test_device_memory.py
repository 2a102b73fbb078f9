"""What a device's process holds: predicted from shapes, kept small where its owner lets it, and nothing before it is needed."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedmini import device_memory, planning
from fedmini.config import BaseSection, parse_run_config
from fedmini.device_memory import Step
from fedmini.model import loading, loss, shapes
from fedmini.model.gradients import Recording
from fedmini.model.lora import LoraModel
from fedmini.model.packed_layers import PackedLinear, only_described
from fedmini.types import EncodedExample, LoraShape
from tests import tiny_llama

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA = LoraShape(2, 4.0, ALL, None, "B", 0)
# What simulations/benchmarks/device_memory.py measured (x86-64, torch 2.13, bfloat16): peak resident MiB.
MEASURED = {
    # adapted, examples, tokens, checkpointing, small_heap
    ("all", 1, 128, False, True): 613,
    ("all", 4, 128, False, True): 783,
    ("all", 4, 128, True, True): 724,
    ("top", 4, 256, False, True): 698,
    ("chat", 1, 256, False, True): 607,
    ("all", 1, 128, False, False): 662,
    ("all", 4, 128, False, False): 864,
    ("top", 4, 256, False, False): 772,
    ("chat", 1, 256, False, False): 631,
    ("all", 8, 128, False, False): 1177,
    ("all", 4, 128, True, False): 801,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> BaseSection:
    folder = tmp_path_factory.mktemp("base")
    return BaseSection(path=tiny_llama.write_gguf(folder / "tiny.gguf"), compute_dtype="float32")


def loaded(source: BaseSection) -> loading.Base:
    return loading.load_base(source, source.path.parent / "cache", lambda note: None)


def kept_for_backward(model: LoraModel, step: Step) -> int:
    """Bytes of all tensors that autograd keeps of one step, each storage once."""
    is_target = np.arange(step.length + 1) == step.length
    example = EncodedExample(np.full(step.length + 1, 5, np.int32), is_target)
    batch = loss.batch_of([example] * step.batch_size, model.base.accelerator)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.module.parameters()}
    seen: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no other takes its place
        return tensor

    rows = torch.zeros(step.batch_size, model.num_parameters)
    kept = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with kept, model._recorder.to(Recording(rows)), model._checkpointing.on():
        losses = model._target_losses(batch, 0)
    del losses
    return sum(one.untyped_storage().nbytes() for place, one in seen.items() if place not in parameters)


@pytest.mark.parametrize(
    "lora", [LORA, replace(LORA, layers=(1,)), replace(LORA, trained="AB"), replace(LORA, target_modules=("v_proj",))]
)
@pytest.mark.parametrize(("batch_size", "length"), [(1, 64), (4, 64), (4, 128)])
def test_what_a_step_keeps_for_backward_is_what_is_predicted(source, lora: LoraShape, batch_size: int, length: int):
    step = Step(batch_size, length, number_bytes=4)
    base = shapes.dimensions(source)
    assert base is not None
    kept = kept_for_backward(LoraModel(loaded(source), lora), step)
    assert device_memory._kept_for_backward(base, lora, step) == pytest.approx(kept, rel=0.15)


def test_what_checkpointing_keeps_is_the_input_of_each_layer(source):
    step = Step(4, 128, number_bytes=4, checkpointing=True)
    base = shapes.dimensions(source)
    kept = kept_for_backward(LoraModel(loaded(source), LORA, checkpointing=True), step)
    one_layer = 4 * 128 * device_memory._in_layer(base, LORA, step)  # is computed again, and there while it is used
    assert device_memory._kept_for_backward(base, LORA, step) - one_layer == pytest.approx(kept, rel=0.15)


def test_nothing_is_kept_of_layers_below_the_lowest_adapted_one(source):
    step = Step(4, 128, number_bytes=4)
    whole, top = (LoraModel(loaded(source), replace(LORA, layers=layers)) for layers in (None, (1,)))
    assert kept_for_backward(top, step) < 0.6 * kept_for_backward(whole, step)


@pytest.mark.parametrize(("how", "measured"), MEASURED.items())
def test_the_predicted_peak_of_the_packaged_base_is_within_15_percent_of_what_was_measured(how, measured: float):
    lora, batch_size, length, checkpointing, small_heap = how
    base = shapes.dimensions(BaseSection(name="smollm2-135m-q4"))
    shape = SHAPES[lora]
    template = shapes.template(shapes.linear_shapes(BaseSection(name="smollm2-135m-q4")), shape)
    num_coordinates = sum(rows * columns for _, (rows, columns) in template)
    step = Step(batch_size, length, 2, checkpointing)
    found = device_memory.peak_bytes(base, shape, num_coordinates, step, small_heap=small_heap)
    assert found / 2**20 == pytest.approx(measured, rel=0.15)


def test_a_plan_says_what_a_device_takes_by_itself_and_what_in_an_app() -> None:
    config = parse_run_config(
        {
            "run": {"name": "memory"},
            "base": {"name": "smollm2-135m-q4", "compute_dtype": "bfloat16"},
            "lora": {"lora_rank": 8, "lora_alpha": 16.0, "target_modules": ALL},
            "data": {"source": "in memory", "max_examples_per_device": 4, "held_out_devices": 1},
            "local": {"sampling_rate": 1.0, "max_length": 128},
            "rounds": {"num_rounds": 1, "cohort_size": 4},
            "privacy": {"none": True},
        }
    )
    template = shapes.template(shapes.linear_shapes(config.base), planning.lora_shape(config))
    manifest = planning.make_manifest(config, "run", planning.Base("0" * 64, template), None)
    base, step = shapes.dimensions(config.base), Step(4, 128, 2)
    by_itself, in_an_app = (
        device_memory.peak_bytes(base, manifest.lora, manifest.num_coordinates, step, small_heap=small_heap) / 1e6
        for small_heap in (True, False)
    )
    assert device_memory.sentence(config, manifest) == (
        f"up to {by_itself:,.0f} MB in bfloat16 ({in_an_app:,.0f} MB in an app), with 4 examples of 128 tokens at once; "
        "an app's heap is not kept small unless training.small_heap says so"
    )
    assert 1.05 * by_itself < in_an_app < 1.5 * by_itself


SHAPES = {
    "all": LoraShape(8, 16.0, ALL, None, "B", 0),
    "top": LoraShape(8, 16.0, ("q_proj", "v_proj"), tuple(range(20, 30)), "B", 0),
    "chat": LoraShape(4, 8.0, ("v_proj",), tuple(range(10, 30)), "B", 0),
}


def test_a_device_that_waits_has_not_loaded_what_computes() -> None:
    heavy = "{'torch', 'transformers', 'peft', 'opacus', 'scipy', 'dp_accounting'}"
    script = f"import sys, fedmini.device; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "[]\n"


HELD = """
import sys, threading
from pathlib import Path
from fedmini.model import runtime

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

if sys.argv[1] == "small":
    assert runtime.keep_heap_small()
large = [bytearray(24 * 2**20) for _ in range(2)]  # as large as raises glibc's own thresholds when it is freed
del large
before = resident()
pieces = [bytearray(2**18) for _ in range(400)]  # 100 MiB, every other one of which is let go
del pieces[::2]
print((resident() - before) >> 20)
runtime.give_back_memory()
print((resident() - before) >> 20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_a_small_heap_gives_back_what_was_freed_at_once_and_any_heap_when_it_is_asked() -> None:
    found = {}
    for heap in ("small", "as it is"):
        done = subprocess.run([sys.executable, "-c", HELD, heap], capture_output=True, text=True)
        found[heap] = tuple(map(int, done.stdout.split()))
    assert 40 <= found["small"][0] <= 60
    assert found["as it is"][0] >= 90, "what this test is about is there"
    assert 40 <= found["as it is"][1] <= 60


def test_an_app_s_allocator_is_left_alone_unless_its_device_may_change_it(tmp_path: Path) -> None:
    script = """
import sys
from fedmini import Device
from fedmini.model import runtime
called = []
runtime.keep_heap_small = lambda: called.append(1)
settings = {"training": {"small_heap": True}} if sys.argv[2] == "may" else {}
Device(sys.argv[1], config=settings, find_keyring=lambda: None).close()
print(len(called))
"""
    for may, expected in (("may", "1"), ("may not", "0")):
        command = [sys.executable, "-c", script, str(tmp_path / may.replace(" ", "-")), may]
        assert subprocess.run(command, capture_output=True, text=True).stdout.strip() == expected


def test_inside_only_described_a_packed_weight_has_a_shape_and_takes_no_memory(source) -> None:
    layer = next(part for part in loaded(source).module.modules() if isinstance(part, PackedLinear))
    dense = layer.weight
    with only_described():
        described = layer.weight
    assert described.shape == dense.shape and described.dtype == dense.dtype and described.device == dense.device
    assert described.untyped_storage().nbytes() == 4
    assert torch.equal(layer.weight, dense) and float(dense.abs().max()) > 0
