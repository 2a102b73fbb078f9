import dataclasses
import json

import numpy as np
import pytest
import tiny_llama
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file

from fedmini.errors import ModelMismatchError, StateError
from fedmini.model.adapters import CONFIG_FILE, TENSORS_FILE, load_peft
from fedmini.model.lora import LoraModel
from fedmini.types import LoraShape

TOKENS = torch.tensor([[3, 9, 27, 40, 5]])


def saved(folder, shape=tiny_llama.SHAPE):
    model = tiny_llama.with_random_adapter(LoraModel(tiny_llama.base(), shape))
    model.save_peft(folder, "tiny")
    return model


@pytest.mark.parametrize("trained", ["B", "AB"])
@pytest.mark.parametrize("layers", [None, (1,)])
def test_plain_peft_loads_the_folder_and_gives_the_same_logits(tmp_path, trained, layers):
    ours = saved(tmp_path, LoraShape(3, 5.0, ("q_proj", "down_proj"), layers, trained, 9))

    theirs = PeftModel.from_pretrained(tiny_llama.llama(), tmp_path)

    with torch.no_grad():
        torch.testing.assert_close(theirs(TOKENS).logits, ours.module(TOKENS).logits, rtol=1e-6, atol=1e-6)
        assert not torch.allclose(theirs(TOKENS).logits, tiny_llama.llama()(TOKENS).logits)


@pytest.mark.parametrize("trained", ["B", "AB"])
def test_what_is_saved_loads_as_it_was(tmp_path, trained):
    shape = dataclasses.replace(tiny_llama.SHAPE, trained=trained, seed=3, layers=(0, 1))
    model = saved(tmp_path, shape)

    loaded_shape, adapter = load_peft(tmp_path)

    assert dataclasses.replace(loaded_shape, target_modules=shape.target_modules) == shape
    assert set(loaded_shape.target_modules) == set(shape.target_modules)
    again = LoraModel(tiny_llama.base(), loaded_shape)
    again.set_adapter(adapter)
    np.testing.assert_array_equal(again.flat(), model.flat())
    with torch.no_grad():
        assert torch.equal(again.module(TOKENS).logits, model.module(TOKENS).logits)


def test_an_adapter_that_peft_wrote_loads_with_both_matrices(tmp_path):
    theirs = get_peft_model(tiny_llama.llama(), LoraConfig(r=2, lora_alpha=4, target_modules=["v_proj"]))
    theirs.eval().save_pretrained(tmp_path)

    shape, adapter = load_peft(tmp_path)
    ours = LoraModel(tiny_llama.base(), shape)
    ours.set_adapter(adapter)

    assert shape.trained == "AB"
    with torch.no_grad():
        torch.testing.assert_close(ours.module(TOKENS).logits, theirs(TOKENS).logits)


def test_the_files_do_not_depend_on_the_order_of_a_set(tmp_path):
    saved(tmp_path / "first")
    saved(tmp_path / "second", dataclasses.replace(tiny_llama.SHAPE, target_modules=("o_proj", "v_proj")))

    for name in (CONFIG_FILE, TENSORS_FILE):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def change_config(folder, **values):
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_tensors(folder, change):
    tensors = dict(load_file(folder / TENSORS_FILE))
    change(tensors)
    save_file(tensors, folder / TENSORS_FILE)


@pytest.mark.parametrize(
    "values",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"peft_type": "PREFIX_TUNING"},
        {"modules_to_save": ["lm_head"]},
        {"rank_pattern": {"v_proj": 8}},
        {"init_lora_weights": "pissa"},
        {"bias": "all"},
        {"target_modules": "all-linear"},
        {"target_modules": ["../../v_proj"]},
        {"target_modules": []},
        {"r": 0},
        {"r": True},
        {"lora_alpha": float("nan")},
        {"layers_to_transform": ["0"]},
        {"layers_to_transform": [7]},
    ],
)
def test_another_method_than_plain_lora_is_refused(tmp_path, values):
    saved(tmp_path)
    change_config(tmp_path, **values)

    with pytest.raises(ModelMismatchError):
        load_peft(tmp_path)


NAME = "base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda tensors: tensors.pop(NAME), ModelMismatchError),
        (lambda tensors: tensors.clear(), ModelMismatchError),
        (lambda tensors: tensors.update({"../escape": np.zeros((2, 2), np.float32)}), ModelMismatchError),
        (lambda tensors: tensors.update({NAME.replace("v_proj", "k_proj"): tensors[NAME]}), ModelMismatchError),
        (lambda tensors: tensors.update({NAME: np.zeros((16, 3), np.float32)}), ModelMismatchError),
        (lambda tensors: tensors.update({NAME: np.zeros((16, 2), np.float16)}), ModelMismatchError),
        (lambda tensors: tensors.update({NAME: np.full((16, 2), np.inf, np.float32)}), StateError),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, change, error):
    saved(tmp_path)
    change_tensors(tmp_path, change)

    with pytest.raises(error):
        load_peft(tmp_path)


def test_a_frozen_matrix_that_is_not_the_seeds_is_refused(tmp_path):
    saved(tmp_path)
    path = tmp_path / TENSORS_FILE
    tensors = dict(load_file(path))
    tensors[NAME.replace("lora_B", "lora_A")] += 1
    save_file(tensors, path, metadata={"fedmini": '{"trained": "B", "seed": 0}'})

    with pytest.raises(ModelMismatchError, match="is not what the seed 0"):
        load_peft(tmp_path)


@pytest.mark.parametrize("name", [CONFIG_FILE, TENSORS_FILE])
def test_a_missing_or_damaged_file_is_refused(tmp_path, name):
    saved(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:40])
    with pytest.raises(StateError, match="damaged"):
        load_peft(tmp_path)

    (tmp_path / name).unlink()
    with pytest.raises(StateError, match="is missing"):
        load_peft(tmp_path)


def test_a_pickled_adapter_is_refused(tmp_path):
    saved(tmp_path)
    (tmp_path / TENSORS_FILE).rename(tmp_path / "adapter_model.bin")

    with pytest.raises(StateError, match="pickled"):
        load_peft(tmp_path)


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(StateError, match="can't write the adapter"):
        saved(tmp_path / "file" / "adapter")
