import dataclasses
import importlib.util
import json
import shutil

import autograd_reference
import pytest
import tiny_llama
import torch

from fedmini.config import BaseSection
from fedmini.errors import ConfigError
from fedmini.model import compute, packaged
from fedmini.model.loading import load_base
from fedmini.model.lora import LoraModel
from fedmini.model.packed_layers import PackedLinear


@pytest.fixture
def folder(tmp_path):
    """The tiny Llama as a transformers folder."""
    tiny_llama.llama().save_pretrained(tmp_path / "folder")
    tiny_llama.tokenizer().save_pretrained(tmp_path / "folder")
    return tmp_path / "folder"


def load(tmp_path, note=print, **section):
    return load_base(BaseSection(compute_dtype="float32", accelerator="cpu", **section), tmp_path / "cache", note)


def without_bitsandbytes(monkeypatch):
    """As on a machine where it is not installed."""
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)


def test_a_transformers_folder_is_held_dense_where_nothing_better_is_installed_and_says_so(
    tmp_path, folder, monkeypatch
):
    without_bitsandbytes(monkeypatch)
    notes = []
    tokens = torch.tensor([[3, 9, 27]])

    base = load(tmp_path, notes.append, path=folder)

    assert base.weights == "dense"
    assert len(notes) == 1
    assert "dense" in notes[0]
    assert "MB" in notes[0]
    torch.testing.assert_close(base.module(tokens).logits, tiny_llama.llama()(tokens).logits)
    assert not any(parameter.requires_grad for parameter in base.module.parameters())
    assert base.tokenizer.chat_template == tiny_llama.TEMPLATE


def test_a_packed_base_and_a_dense_copy_of_it_have_the_same_digest(tmp_path, monkeypatch):
    without_bitsandbytes(monkeypatch)
    packed = load(tmp_path, path=tiny_llama.write_gguf(tmp_path / "tiny.gguf", "F32"))
    tiny_llama.llama().save_pretrained(tmp_path / "copy")
    (tokenizer,) = tmp_path.glob("**/bases/*/tokenizer")
    shutil.copytree(tokenizer, tmp_path / "copy", dirs_exist_ok=True)
    dense = load(tmp_path, path=tmp_path / "copy")

    assert dense.weights_digest == packed.weights_digest
    assert LoraModel(dense, tiny_llama.SHAPE).fingerprint == LoraModel(packed, tiny_llama.SHAPE).fingerprint


def test_the_digest_does_not_depend_on_the_compute_type(tmp_path):
    path = tiny_llama.write_gguf(tmp_path / "tiny.gguf")
    exact = load(tmp_path, path=path)

    rounded = load_base(BaseSection(path=path, compute_dtype="bfloat16"), tmp_path / "cache", print)

    assert rounded.weights_digest == exact.weights_digest
    assert (exact.compute_dtype, rounded.compute_dtype) == (torch.float32, torch.bfloat16)


def test_other_weights_have_another_digest(tmp_path):
    first = load(tmp_path, path=tiny_llama.write_gguf(tmp_path / "first.gguf", seed=0))

    assert load(tmp_path, path=tiny_llama.write_gguf(tmp_path / "second.gguf", seed=1)).weights_digest != (
        first.weights_digest
    )


def test_a_packed_base_is_smaller_than_a_dense_one(tmp_path):
    sizes = {
        kind: load(tmp_path, path=tiny_llama.write_gguf(tmp_path / f"{kind}.gguf", kind)).size_bytes
        for kind in ("Q4_1", "Q8_0", "F32")
    }

    assert sizes["Q4_1"] < sizes["Q8_0"] < sizes["F32"] / 3


@pytest.mark.parametrize("weights", ["nf4", "int8", "dense"])
def test_a_gguf_stays_packed(tmp_path, weights):
    path = tiny_llama.write_gguf(tmp_path / "tiny.gguf")

    with pytest.raises(ConfigError, match="a GGUF stays packed"):
        load(tmp_path, path=path, weights=weights)


def test_packed_is_refused_for_a_folder(tmp_path, folder):
    with pytest.raises(ConfigError, match="is for GGUF files"):
        load(tmp_path, path=folder, weights="packed")


def test_int8_without_bitsandbytes_is_refused_with_the_command(tmp_path, folder, monkeypatch):
    without_bitsandbytes(monkeypatch)

    with pytest.raises(ConfigError, match="pip install bitsandbytes"):
        load(tmp_path, path=folder, weights="int8")


def test_pickled_weights_are_refused(tmp_path, folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")

    with pytest.raises(ConfigError, match="pickled weights"):
        load(tmp_path, path=folder)


def test_code_in_a_folder_is_not_run(tmp_path, folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoModelForCausalLM": "own.Model", "AutoConfig": "own.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("raise SystemExit('it ran')")

    with pytest.raises(ConfigError, match="can't load"):
        load(tmp_path, path=folder, weights="dense")


def test_a_damaged_safetensors_file_is_refused(tmp_path, folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])

    with pytest.raises(ConfigError):
        load(tmp_path, path=folder, weights="dense")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "there is nothing at"),
        (lambda path: path.mkdir(), "neither a .gguf file nor a transformers folder"),
        (lambda path: path.write_text("x"), "neither a .gguf file nor a transformers folder"),
    ],
)
def test_a_path_that_is_no_model_is_refused(tmp_path, make, message):
    make(tmp_path / "model")

    with pytest.raises(ConfigError, match=message):
        load(tmp_path, path=tmp_path / "model")


def test_an_unreachable_hub_is_one_clear_error(tmp_path):
    with pytest.raises(ConfigError, match="can't get 'nobody/nothing' from the hub"):
        load(tmp_path, hub_id="nobody/nothing")


def test_an_unknown_packaged_base_names_those_there_are(tmp_path):
    with pytest.raises(ConfigError, match="the packaged ones are smollm2-135m-q4"):
        load(tmp_path, name="smollm3")


def test_a_missing_package_names_the_file_its_hash_and_the_command(monkeypatch):
    known = packaged.PACKAGED["smollm2-135m-q4"]
    monkeypatch.setitem(packaged.PACKAGED, "other", dataclasses.replace(known, package="llm_that_is_not_installed"))

    with pytest.raises(ConfigError) as caught:
        packaged.find("other")

    for expected in (known.file_name, known.sha256, known.install):
        assert expected in str(caught.value)


@pytest.mark.parametrize("content", [b"short", None])
def test_a_truncated_or_absent_packaged_file_is_refused(tmp_path, monkeypatch, content):
    known = dataclasses.replace(packaged.PACKAGED["smollm2-135m-q4"], package="llm_of_this_test", size_bytes=9)
    (tmp_path / "llm_of_this_test").mkdir()
    (tmp_path / "llm_of_this_test" / "__init__.py").write_text("raise SystemExit('it was imported')")
    if content is not None:
        (tmp_path / "llm_of_this_test" / known.file_name).write_bytes(content)
    monkeypatch.setitem(packaged.PACKAGED, "other", known)
    monkeypatch.syspath_prepend(tmp_path)

    with pytest.raises(ConfigError, match=known.sha256):
        packaged.find("other")


def test_a_packaged_file_with_another_hash_is_refused(tmp_path, monkeypatch):
    known = dataclasses.replace(packaged.PACKAGED["smollm2-135m-q4"], package="llm_of_this_test", size_bytes=9)
    (tmp_path / "llm_of_this_test").mkdir()
    (tmp_path / "llm_of_this_test" / known.file_name).write_bytes(b"ninebytes")
    monkeypatch.setitem(packaged.PACKAGED, "other", known)
    monkeypatch.syspath_prepend(tmp_path)

    with pytest.raises(ConfigError, match="it is another file or damaged"):
        load(tmp_path, name="other")


def test_the_compute_type_is_measured_where_it_is_not_given():
    assert compute.choose_compute_dtype("auto", torch.device("cpu")) in (torch.float32, torch.bfloat16)
    assert compute.choose_compute_dtype("bfloat16", torch.device("cpu")) is torch.bfloat16


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_refused():
    assert compute.choose_accelerator("auto").type == "cpu"
    with pytest.raises(ConfigError, match="sees no GPU"):
        compute.choose_accelerator("cuda")


def test_gradients_through_nf4_are_those_of_the_same_weights_held_dense(tmp_path, folder, monkeypatch):
    without_bitsandbytes(monkeypatch)
    base = load(tmp_path, path=folder, weights="nf4")
    dense = dataclasses.replace(base, module=tiny_llama.llama(), weights="dense")
    packed = {name: layer for name, layer in base.module.named_modules() if isinstance(layer, PackedLinear)}
    for name, layer in packed.items():
        dense.module.get_submodule(name).weight.copy_(layer.weight)
    examples = tiny_llama.examples((7, 12))
    shape = dataclasses.replace(tiny_llama.SHAPE, target_modules=("q_proj", "v_proj", "down_proj"))
    models = [tiny_llama.with_random_adapter(LoraModel(one, shape)) for one in (base, dense)]

    got, expected = (model.example_gradients(examples) for model in models)

    assert base.weights == "nf4"
    assert (
        sorted(name.split(".")[-1] for name in packed) == ["down_proj"] * tiny_llama.LAYERS
    )  # the others have 32 inputs
    torch.testing.assert_close(got.gradients, expected.gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_rows_through_int8_are_the_gradients_of_each_example_alone(tmp_path, folder):
    base = load(tmp_path, path=folder, weights="int8")
    model = tiny_llama.with_random_adapter(LoraModel(base, tiny_llama.SHAPE))
    (example,) = tiny_llama.examples((12,))

    rows = model.example_gradients([example])
    autograd_reference.mean_loss_gradient(model, [example])
    alone = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    assert base.weights == "int8"
    torch.testing.assert_close(rows.gradients[0], alone, rtol=1e-4, atol=1e-6)
