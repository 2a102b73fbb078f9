"""The LoRA tensors known from headers are those that the loaded model has."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from fedmini.config import BaseSection
from fedmini.errors import ConfigError
from fedmini.model import packaged, shapes
from fedmini.model.gguf_file import GgufFile
from fedmini.model.lora import LoraModel
from fedmini.types import LoraShape
from tests import tiny_llama

SHAPES = [
    LoraShape(2, 4.0, ("v_proj", "o_proj"), None, "B", 0),
    LoraShape(3, 4.0, ("q_proj", "down_proj"), (1,), "AB", 0),
    LoraShape(1, 4.0, ("k_proj", "gate_proj", "up_proj"), (0, 1), "B", 0),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_template_from_a_gguf_header_is_the_models(tmp_path: Path, shape: LoraShape) -> None:
    path = tiny_llama.write_gguf(tmp_path / "tiny.gguf")
    assert (
        shapes.template(shapes.linear_shapes(BaseSection(path=path)), shape)
        == LoraModel(tiny_llama.base(), shape).template
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_a_template_from_a_transformers_folder_is_the_models(tmp_path: Path, shape: LoraShape) -> None:
    tiny_llama.llama().save_pretrained(tmp_path)
    found = shapes.template(shapes.linear_shapes(BaseSection(path=tmp_path)), shape)
    assert found == LoraModel(tiny_llama.base(), shape).template


def test_the_packaged_bases_shapes_are_those_in_its_file() -> None:
    try:
        base, path = packaged.find("smollm2-135m-q4")
    except ConfigError:
        pytest.skip("the packaged base is not installed")
    config = GgufFile(path).config
    assert {key: config[key] for key in base.config} == dict(base.config)


def test_what_adapts_nothing_is_refused_with_what_there_is(tmp_path: Path) -> None:
    path = tiny_llama.write_gguf(tmp_path / "tiny.gguf")
    known = shapes.linear_shapes(BaseSection(path=path))
    with pytest.raises(ConfigError, match=r"adapts nothing; this base has down_proj, .*v_proj"):
        shapes.template(known, LoraShape(2, 4.0, ("query",), None, "B", 0))
    with pytest.raises(ConfigError, match="adapts nothing"):
        shapes.template(known, LoraShape(2, 4.0, ("v_proj",), (9,), "B", 0))


def test_a_damaged_safetensors_header_is_one_clear_line(tmp_path: Path) -> None:
    save_file({"model.layers.0.self_attn.v_proj.weight": np.zeros((2, 2), np.float32)}, tmp_path / "model.safetensors")
    raw = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(raw[:20])
    with pytest.raises(ConfigError, match="is not a readable safetensors file"):
        shapes.linear_shapes(BaseSection(path=tmp_path))
