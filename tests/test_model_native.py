import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_llama
import torch

from fedmini.errors import ConfigError
from fedmini.model import compiling, layer_kernels, native
from fedmini.model.blocks import Blocks

PREPARE = """
import sys
from pathlib import Path
from fedmini.model import compiling, layer_kernels, native
native.prepare(Path(sys.argv[1]), print)
native.prepare(Path(sys.argv[1]), print)
print("compiled" if native.current() else "plain torch")
"""
ANSWER = """
import json, sys
from pathlib import Path
import torch
from fedmini.config import BaseSection
from fedmini.model import loading, native
section = BaseSection(path=Path(sys.argv[1]), compute_dtype="float32", accelerator="cpu")
base = loading.load_base(section, Path(sys.argv[1]).parent / "cache", print)
logits = base.module(torch.tensor([[5, 9, 40, 12]])).logits
print("compiled" if native.current() else "plain torch")
print(json.dumps(logits.tolist()))
"""


@pytest.fixture
def extensions(tmp_path, monkeypatch):
    """Where the libraries of this test alone lie."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    return tmp_path / "extensions"


@pytest.fixture
def needs_compiler(compiled_kernel):
    if compiled_kernel is None:
        pytest.skip("there is no compiler here")


def start(script, argument, **environment):
    command = [sys.executable, "-c", script, str(argument)]
    return subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True)


def lines(process):
    """What a process of its own says until it ends well."""
    said, _ = process.communicate(timeout=170)
    assert process.returncode == 0
    return said.splitlines()


@pytest.mark.usefixtures("needs_compiler")
def test_a_base_answers_the_same_without_a_compiler_and_says_once_what_is_missing(tmp_path):
    path = tiny_llama.write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "empty").mkdir()

    compiled, *rest = lines(start(ANSWER, path))
    note, plain, *same = lines(
        start(ANSWER, path, PATH=str(tmp_path / "empty"), TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions"))
    )

    assert (compiled, plain) == ("compiled", "plain torch")
    assert (
        "by plain torch, which is slower" in note and "there is no compiler 'c++'" in note and "fedmini[native]" in note
    )
    torch.testing.assert_close(*(torch.tensor(json.loads(found[0])) for found in (rest, same)), rtol=1e-4, atol=1e-5)


def test_a_compiler_that_fails_leaves_plain_torch_and_one_note(tmp_path, extensions):
    note, outcome = lines(start(PREPARE, tmp_path, CXX="/bin/false"))

    assert outcome == "plain torch"
    assert "could not be compiled" in note and "fedmini[native]" in note
    assert list((extensions / "fedmini" / "kernels").iterdir()) == []


@pytest.mark.usefixtures("needs_compiler")
def test_processes_that_build_at_once_both_get_a_library_and_leave_one(tmp_path, extensions):
    both = [start(PREPARE, tmp_path) for _ in range(2)]

    assert [lines(process) for process in both] == [["compiled"], ["compiled"]]
    (folder,) = (extensions / "fedmini" / "kernels").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["fedmini_kernels.so", "manifest.json"]


@pytest.mark.usefixtures("needs_compiler")
def test_a_damaged_library_is_never_loaded_but_built_again_with_a_note(tmp_path, monkeypatch):
    whole = compiling.library(tmp_path, print)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    damaged = tmp_path / "fedmini" / "kernels" / whole.parent.name / whole.name
    shutil.copytree(whole.parent, damaged.parent)
    damaged.write_bytes(whole.read_bytes()[:-1000] + bytes(1000))
    notes = []

    again = compiling.library(tmp_path, notes.append)

    assert again == damaged
    assert len(notes) == 1 and "damaged" in notes[0] and "building it again" in notes[0]
    assert native.Kernel(again).columns(nibbles()) is not None


@pytest.mark.usefixtures("needs_compiler")
def test_a_library_is_found_again_and_not_built_twice(tmp_path, extensions, monkeypatch):
    first = compiling.library(tmp_path, print)
    monkeypatch.setenv("CXX", "/bin/false")

    assert compiling.library(tmp_path, print) == first
    assert extensions in first.parents


# The levels that torch can run at here, as its own variable names them.
LEVELS = {"AVX512": ("default", "avx2", "avx512"), "AVX2": ("default", "avx2")}.get(
    torch.backends.cpu.get_cpu_capability(), ("default",)
)


@pytest.mark.usefixtures("needs_compiler")
@pytest.mark.parametrize("level", LEVELS)
def test_each_level_of_the_processor_has_a_library_of_its_own_that_gives_the_same_numbers(tmp_path, level):
    properties = ("test_model_packing.py", "compiled and (bit_for_bit or rounded_once)")
    script = (
        "import sys, pytest; from pathlib import Path; from fedmini.model import compiling;"
        "print(compiling.library(Path(), print));"
        f"sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', sys.argv[1], '-k', {properties[1]!r}]))"
    )

    path, *said = lines(start(script, Path(__file__).with_name(properties[0]), ATEN_CPU_CAPABILITY=level))

    assert any("7 passed" in line for line in said)
    flags = json.loads(Path(path).with_name("manifest.json").read_text())["facts"]["flags"]
    assert ("-mavx2" in flags, "-mavx512f" in flags) == (level != "default", level == "avx512")


def test_a_file_that_is_no_library_and_one_without_the_functions_are_refused(tmp_path):
    (tmp_path / "text.so").write_text("no library")

    with pytest.raises(ConfigError, match="can't load"):
        native.Kernel(tmp_path / "text.so")
    with pytest.raises(ConfigError, match="can't load"):
        native.Kernel(Path(torch.__file__).parent / "lib" / "libc10.so")


@pytest.mark.usefixtures("needs_compiler")
def test_a_library_that_gives_other_numbers_is_refused(tmp_path):
    (tmp_path / "idle.cpp").write_text(
        'extern "C" void dequantise_columns(const void*, void*, long) {}\n'
        'extern "C" void dequantise_rows(const void*, void*, long) {}\n'
        + "".join(f'extern "C" void {name}() {{}}\n' for name in layer_kernels._SIGNATURES)
    )
    subprocess.run(["c++", "-shared", "-fPIC", "idle.cpp", "-o", "idle.so"], cwd=tmp_path, check=True)

    with pytest.raises(ConfigError, match="other numbers than plain torch"):
        native.Kernel(tmp_path / "idle.so")


def nibbles():
    """Two blocks of three outputs."""
    levels = tuple(float(level) for level in range(16))
    values = torch.arange(2 * 16 * 3, dtype=torch.uint8).view(2, 16, 3)
    return Blocks(values, torch.ones((2, 3), dtype=torch.float16), None, levels)


@pytest.mark.usefixtures("needs_compiler")
def test_what_would_be_read_or_written_beyond_its_end_is_refused(compiled_kernel):
    blocks = nibbles()
    fill = compiled_kernel.columns(blocks)
    fill(torch.empty(64, 3))

    for wrong in (torch.empty(64, 2), torch.empty(65, 3), torch.empty(64, 3).half(), torch.empty(3, 64).t()):
        with pytest.raises(ValueError, match="expected 192 numbers"):
            fill(wrong)
    for part in (
        {"scales": blocks.scales[:1]},
        {"minimums": blocks.scales[:1]},
        {"scales": blocks.scales.double()},
        {"values": blocks.values.float()},
        {"values": blocks.values.transpose(0, 1)},
    ):
        with pytest.raises(ValueError, match="expected"):
            compiled_kernel.columns(dataclasses.replace(blocks, **part))


def test_what_a_block_dequantises_with_ends_with_the_block():
    before = native.current()

    with pytest.raises(KeyError), native.using(None):
        assert native.current() is None
        raise KeyError

    assert native.current() is before
