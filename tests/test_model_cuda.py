"""The same numbers on a GPU as on a CPU; skipped where there is none."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from fedmini.config import BaseSection
from fedmini.model import loading
from fedmini.model.lora import LoraModel
from tests import tiny_llama

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")

EXAMPLES = tiny_llama.examples((5, 9, 7, 12))


def on(accelerator: str, gguf: Path, folder: Path) -> LoraModel:
    section = BaseSection(path=gguf, accelerator=accelerator, compute_dtype="float32")  # type: ignore[arg-type]
    base = loading.load_base(section, folder / "cache", lambda note: None)
    return tiny_llama.with_random_adapter(LoraModel(base, tiny_llama.SHAPE))


def test_packed_weights_gradients_and_losses_are_those_of_the_cpu(tmp_path: Path) -> None:
    gguf = tiny_llama.write_gguf(tmp_path / "tiny.gguf")
    cpu, gpu = on("cpu", gguf, tmp_path), on("cuda", gguf, tmp_path)
    expected, found = cpu.example_gradients(EXAMPLES), gpu.example_gradients(EXAMPLES)
    assert found.gradients.device.type == "cuda"
    torch.testing.assert_close(found.gradients.cpu(), expected.gradients, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-4)
    assert gpu.fingerprint == cpu.fingerprint
    assert gpu.evaluate(EXAMPLES, 2)[0] == pytest.approx(cpu.evaluate(EXAMPLES, 2)[0], rel=1e-4)


def test_a_detached_prefix_works_there_too(tmp_path: Path) -> None:
    base = dataclasses.replace(tiny_llama.base(), module=tiny_llama.llama().cuda(), accelerator=torch.device("cuda"))
    model = LoraModel(base, tiny_llama.SHAPE, detached_prefix=(3, 4, 5, 6))
    assert np.isfinite(model.example_gradients(EXAMPLES).losses).all()
