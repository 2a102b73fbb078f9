"""Opacus's optimizer by itself, in processes of their own: what is imported when decides everything here."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedmini import descent

ROOT = Path(__file__).resolve().parent.parent
ALONE = "import sys\nfrom fedmini import descent, opacus_optimizer\nfrom fedmini.opacus_optimizer import DPOptimizer\n"
WHOLE = "import opacus, opacus.optimizers.optimizer\n"
SAME = (
    "assert opacus.optimizers.DPOptimizer is DPOptimizer\n"
    "assert opacus.optimizers.optimizer.DPOptimizer is DPOptimizer\n"
    "assert sys.modules['opacus.optimizers.optimizer'].DPOptimizer is DPOptimizer\n"
    "assert issubclass(opacus.optimizers.DPPerLayerOptimizer, DPOptimizer)\n"
)
MADE = (
    "import torch\n"
    "def made(kind):\n"
    "    inner = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=1.0)\n"
    "    return kind(inner, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=1)\n"
)


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_optimizer_comes_without_the_rest_of_opacus_and_nothing_heavy() -> None:
    heavy = "('opacus', 'scipy', 'sympy', 'torch.distributed.tensor', 'torch._dynamo')"
    assert run(f"{ALONE}print([name for name in {heavy} if name in sys.modules])") == "[]\n"


def test_it_is_opacus_own_class_by_name_and_by_file() -> None:
    code = f"{ALONE}print(DPOptimizer.__module__, DPOptimizer.__qualname__, DPOptimizer.step.__code__.co_filename)"
    module, name, file = run(code).split()
    assert (module, name) == ("opacus.optimizers.optimizer", "DPOptimizer")
    assert Path(file).parts[-3:] == ("opacus", "optimizers", "optimizer.py")


def test_it_clips_noises_and_steps() -> None:
    code = (
        f"{ALONE}{MADE}"
        "optimizer = made(DPOptimizer)\n"
        "optimizer.noise_multiplier = 0.0\n"
        "parameter = optimizer.params[0]\n"
        "parameter.grad_sample = torch.tensor([[3.0, 4.0]])\n"
        "optimizer.step()\n"
        "print([round(value, 4) for value in parameter.tolist()])\n"
    )
    assert run(code) == "[0.4, 0.2]\n"  # 1 minus a gradient of norm 5 clipped to norm 1


def test_it_steps_with_plain_descent_without_torchs_compiler() -> None:
    code = (
        f"{ALONE}import torch\n"
        "parameter = torch.nn.Parameter(torch.ones(2))\n"
        "inner = descent.Sgd([parameter], lr=0.5)\n"
        "optimizer = DPOptimizer(inner, noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=1)\n"
        "parameter.grad_sample = torch.tensor([[3.0, 4.0]])\n"
        "optimizer.step()\n"
        "optimizer.zero_grad()\n"
        "print([round(value, 4) for value in parameter.tolist()], parameter.grad, 'torch._dynamo' in sys.modules)\n"
    )
    assert run(code) == "[0.7, 0.6] None False\n"  # 1 minus half a gradient of norm 5 clipped to norm 1


@pytest.mark.parametrize("lr", [1.0, 0.1, 30.0])
def test_plain_descent_is_torchs_to_the_bit(lr: float) -> None:
    draw = torch.Generator().manual_seed(0)
    start = [torch.randn(3, 5, generator=draw), torch.randn(7, generator=draw), torch.randn(2, generator=draw)]
    ours, theirs = ([torch.nn.Parameter(part.clone()) for part in start] for _ in range(2))
    optimizers = descent.Sgd(ours, lr=lr), torch.optim.SGD(theirs, lr=lr)
    for _ in range(3):
        for mine, its in list(zip(ours, theirs, strict=True))[:2]:  # the third never has a gradient
            mine.grad = torch.randn(mine.shape, generator=draw)
            its.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(mine, its) for mine, its in zip(ours, theirs, strict=True))
    assert all(mine.grad is None for mine in ours)
    assert not torch.equal(ours[0], start[0]) and torch.equal(ours[2], start[2])


def test_opacus_that_is_imported_later_is_complete_and_has_the_very_class() -> None:
    # The submodule is an attribute of its package, though nobody named it.
    run(f"{ALONE}hooks = len(sys.meta_path)\nimport opacus\n{SAME}assert len(sys.meta_path) == hooks - 1")


def test_what_was_left_out_is_filled_in_when_opacus_is_imported() -> None:
    run(
        f"{ALONE}{WHOLE}import typing\nfrom torch.distributed.tensor import DTensor\n"
        "module = opacus.optimizers.optimizer\n"
        "assert module.DTensor is DTensor\n"
        "assert DTensor in typing.get_args(typing.get_type_hints(module._generate_noise)['return'])\n"
        "assert module.params is opacus.optimizers.utils.params\n"
    )


def test_an_instance_made_before_or_after_belongs_to_both() -> None:
    run(
        f"{ALONE}{MADE}before = made(DPOptimizer)\n{WHOLE}"
        "after = made(opacus.optimizers.DPOptimizer)\n"
        "assert isinstance(before, opacus.optimizers.DPOptimizer) and isinstance(after, DPOptimizer)\n"
    )


def test_opacus_that_was_imported_before_is_used_as_it_is() -> None:
    run(f"{WHOLE}import sys\nhooks = len(sys.meta_path)\n{ALONE}{SAME}assert len(sys.meta_path) == hooks")


def test_another_version_is_imported_whole() -> None:
    other = "import importlib.metadata as metadata\nmetadata.version = lambda name: '1.5.4'\n"
    run(f"{other}{ALONE}import opacus\n{SAME}assert 'opacus.privacy_engine' in sys.modules")


def test_files_that_cannot_be_loaded_by_themselves_are_imported_with_the_package() -> None:
    refuse = (
        "import importlib.util as util\n"
        "real = util.spec_from_file_location\n"
        "util.spec_from_file_location = lambda name, *rest, **named: "
        "None if name.startswith('opacus') else real(name, *rest, **named)\n"
    )
    run(f"{refuse}{ALONE}import opacus\n{SAME}assert 'opacus.privacy_engine' in sys.modules")


def test_a_file_that_needs_more_of_opacus_is_imported_with_the_package(tmp_path: Path) -> None:
    """A made-up Opacus: its optimizer imports a third module, which those two files do not have."""
    folder = tmp_path / "opacus" / "optimizers"
    folder.mkdir(parents=True)
    (tmp_path / "opacus" / "__init__.py").write_text("from . import optimizers\n")
    (folder / "__init__.py").write_text("from .optimizer import DPOptimizer\n")
    (folder / "utils.py").write_text("params = 1\n")
    (folder / "third.py").write_text("third = 3\n")
    (folder / "optimizer.py").write_text(
        "from opacus.optimizers.third import third\nclass DPOptimizer:\n    value = third\n"
    )
    found = run(
        f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n{ALONE}import opacus\n"
        "print(DPOptimizer.value, opacus.optimizers.DPOptimizer is DPOptimizer, opacus.optimizers.third.third)"
    )
    assert found == "3 True 3\n"
