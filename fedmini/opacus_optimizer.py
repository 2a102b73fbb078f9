"""Opacus's DPOptimizer without the rest of Opacus, whose import takes 1.5 s and 115 MB and which is not used here.

Opacus has no way to ask for it: whoever imports one of its modules imports them all. So the two files that DPOptimizer
needs are loaded by themselves, as importlib documents it, and nothing is put into sys.modules. Whoever imports Opacus
later gets the complete package, and in it these very modules. Where anything is not as expected, Opacus is imported whole.
"""

import builtins
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

KNOWN_VERSION = "1.6.0"  # of Opacus, whose files were read: any other is imported whole
UTILS, OPTIMIZER = "opacus.optimizers.utils", "opacus.optimizers.optimizer"
TENSORS = "torch.distributed.tensor"  # 0.5 s of the import: OPTIMIZER names its DTensor in annotations only


def load_optimizer() -> Any:
    """The class `opacus.optimizers.DPOptimizer`: one and the same, whether Opacus is imported before, later or never."""
    modules = None if _is_imported() else _load_alone()
    if modules is None or _is_imported():  # another thread may just have begun to
        from opacus.optimizers import DPOptimizer

        return DPOptimizer
    sys.meta_path.insert(0, _HandOver(modules))
    return modules[OPTIMIZER].DPOptimizer


def _is_imported() -> bool:
    return any(name.partition(".")[0] == "opacus" for name in list(sys.modules))


def _load_alone() -> dict[str, ModuleType] | None:
    """The two modules, executed; None where that can't be done."""
    modules: dict[str, ModuleType] = {}
    try:
        opacus = importlib.util.find_spec("opacus")
        if opacus is None or not opacus.submodule_search_locations or version("opacus") != KNOWN_VERSION:
            return None
        folder = Path(opacus.submodule_search_locations[0]) / "optimizers"
        for name in (UTILS, OPTIMIZER):
            modules[name] = _execute(name, folder / f"{name.rpartition('.')[2]}.py", _importer(modules))
    except Exception:  # whatever a changed installation raises, the whole import gives the class, or its own error
        return None
    return modules if hasattr(modules[OPTIMIZER], "DPOptimizer") else None


def _execute(name: str, path: Path, importer: Callable[..., Any]) -> ModuleType:
    """A file as a module, whose import statements `importer` answers."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    module.__dict__["__builtins__"] = {**vars(builtins), "__import__": importer}
    spec.loader.exec_module(module)
    module.__dict__["__builtins__"] = vars(builtins)
    return module


def _importer(modules: Mapping[str, ModuleType]) -> Callable[..., Any]:
    """What stands in for `__import__`: takes Opacus's modules from those given, and imports no distributed tensors."""

    def find(name: str, *where: Any, **named: Any) -> Any:
        if name.partition(".")[0] == "opacus":
            return modules[name]
        if name == TENSORS and name not in sys.modules:
            return SimpleNamespace(DTensor=type("DTensor", (), {}))
        return builtins.__import__(name, *where, **named)

    return find


class _HandOver(MetaPathFinder, Loader):
    """Gives modules that were executed already to whoever imports Opacus, each once, and is gone then."""

    def __init__(self, modules: dict[str, ModuleType]) -> None:
        self._modules = modules

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a module that is here; None of any other."""
        module = self._modules.get(fullname)
        return importlib.util.spec_from_file_location(fullname, module.__file__, loader=self) if module else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module, as it is."""
        return self._modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        """Fill in what was left out."""
        if module.__name__ == OPTIMIZER:
            from torch.distributed.tensor import DTensor

            module.__dict__["DTensor"] = DTensor
        del self._modules[module.__name__]
        if not self._modules:
            sys.meta_path.remove(self)


DPOptimizer: Any = load_optimizer()
