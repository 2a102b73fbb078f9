"""The layers, the libraries' places and the sizes that CONTRIBUTING.md describes, enforced on syntax trees.

A new module under fedmini/ fails here until it is in `LAYERS`. The checks are functions from sources to sentences, so
that the tests at the end can hand them sources that break each rule.
"""

import ast
import importlib.metadata
import re
import sys
import tomllib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# A module imports strictly lower layers only. A subpackage stands here once; its modules may import each other.
LAYERS: Mapping[str, int] = {
    "fedmini.errors": 0,
    "fedmini.types": 0,
    "fedmini.command_help": 1,
    "fedmini.files": 1,
    "fedmini.vectors": 1,
    "fedmini.config": 1,
    "fedmini.manifest_file": 1,
    "fedmini.metrics": 1,
    "fedmini.phrases": 1,
    "fedmini.schedule": 1,
    "fedmini.events": 1,
    "fedmini.ending": 1,
    "fedmini.privacy": 2,
    "fedmini.secagg": 2,
    "fedmini.model": 2,
    "fedmini.data": 2,
    "fedmini.store": 2,
    "fedmini.conditions": 2,
    "fedmini.checkpoint": 2,
    "fedmini.aggregates": 2,
    "fedmini.server_step": 2,
    "fedmini.sums": 2,
    "fedmini.descent": 2,
    "fedmini.opacus_optimizer": 2,
    "fedmini.integer_optimizer": 3,
    "fedmini.local": 4,
    "fedmini.local_evaluation": 3,
    "fedmini.evaluation_planning": 3,
    "fedmini.attempts": 3,
    "fedmini.device_evaluation": 5,
    "fedmini.cohorts": 3,
    "fedmini.rounds": 4,
    "fedmini.run_history": 4,
    "fedmini.rundir": 3,
    "fedmini.planning": 4,
    "fedmini.pace": 3,
    "fedmini.floors": 3,
    "fedmini.offer": 3,
    "fedmini.randomness": 3,
    "fedmini.operator_keys": 3,
    "fedmini.secure_sum": 3,
    "fedmini.server_folder": 3,
    "fedmini.contributor": 5,
    "fedmini.forecast": 4,
    "fedmini.device_memory": 4,
    "fedmini.member": 4,
    "fedmini.statement": 4,
    "fedmini.enrolment": 5,
    "fedmini.simulation": 6,
    "fedmini.flower": 5,
    "fedmini.report": 5,
    "fedmini.chat": 5,
    "fedmini.deployment": 6,
    "fedmini.device": 6,
    "fedmini.display": 7,
    "fedmini.device_service": 7,
    "fedmini.bench_commands": 8,
    "fedmini.flower_apps": 8,
    "fedmini.device_commands": 8,
    "fedmini.device_serving_commands": 8,
    "fedmini.operator_commands": 8,
    "fedmini.server_commands": 8,
    "fedmini.serving_commands": 8,
    "fedmini.cli": 9,
    "fedmini.__main__": 10,
}

# Who may import a library. Everywhere else it is an error, inside a function too.
HOMES: Mapping[str, tuple[str, ...]] = {
    "flwr": ("fedmini.flower", "fedmini.flower_apps"),
    "torch": (
        "fedmini.model",
        "fedmini.descent",
        "fedmini.integer_optimizer",
        "fedmini.opacus_optimizer",
        "fedmini.local",
    ),
    "transformers": ("fedmini.model",),
    "peft": ("fedmini.model",),
    "opacus": ("fedmini.opacus_optimizer",),
    "pydantic": ("fedmini.config", "fedmini.manifest_file"),
    "msgpack": ("fedmini.secagg",),
    "cryptography": (
        "fedmini.privacy.noise",
        "fedmini.model",
        "fedmini.secagg",
        "fedmini.operator_keys",
        "fedmini.server_folder",
        "fedmini.store",
        "fedmini.flower",
    ),
    "psutil": ("fedmini.conditions", "fedmini.device"),
    "grpc": ("fedmini.device_service",),
    "httpx": ("fedmini.flower",),
    "uvicorn": ("fedmini.flower",),
    "starlette": ("fedmini.flower",),
    "fastapi": ("fedmini.flower",),
    "uvloop": ("fedmini.flower",),
    "sqlite3": ("fedmini.store", "fedmini.server_folder"),
    "keyring": ("fedmini.store",),
    "secretstorage": ("fedmini.store",),
    "dp_accounting": ("fedmini.privacy.gaussian_loss",),
}

PICKLERS = frozenset({"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"})
CRYPTOGRAPHIC_ONLY = ("fedmini.privacy", "fedmini.secagg")  # no `random`, no `numpy.random`: invariant 7
WORDS_THAT_NAME_NOTHING = frozenset({"util", "utils", "helper", "helpers", "manager", "managers", "engine", "factory"})
NAMES_THAT_NAME_NOTHING = WORDS_THAT_NAME_NOTHING | {"base", "common", "misc"}
CLASS_SUFFIXES_THAT_NAME_NOTHING = ("Manager", "Helper", "Helpers", "Util", "Utils", "Factory")

MODULE_LINES, MODULE_LINES_AIM = 300, 250
FUNCTION_LINES = 60
APP_LINES = 60


@dataclass(frozen=True)
class Source:
    """One module: its dotted name (a package's is the package's), whether it is a package, and its text."""

    name: str
    text: str
    is_package: bool = False

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, filename=self.name)

    @property
    def num_lines(self) -> int:
        return len(self.text.splitlines())


@dataclass(frozen=True)
class Import:
    """One imported dotted name, as deep as it is known: `from a import b` is a.b, whatever b is."""

    line: int
    target: str


def read_sources(folder: Path) -> tuple[Source, ...]:
    sources = []
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        sources.append(Source(name, path.read_text(encoding="utf-8"), is_package))
    return tuple(sources)


def imports_of(source: Source, tree: ast.AST | None = None) -> Iterator[Import]:
    for node in ast.walk(tree or source.tree):
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = _absolute_package(source, node)
            yield from (Import(node.lineno, f"{package}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and _last_name(node.func) in {"import_module", "__import__"}:
            argument = node.args[0] if node.args else None
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield Import(node.lineno, argument.value)


def layer_of(module: str) -> int | None:
    """The layer of the module that a dotted name lies in, or None where the table does not know it."""
    entry = _entry(module)
    return None if entry is None else LAYERS[entry]


def unknown_modules(sources: Iterable[Source]) -> list[str]:
    return [
        f"{source.name} is in no layer: add it to LAYERS in tests/test_architecture.py and to the table in "
        "CONTRIBUTING.md, or move its code to a module that is there (a new module needs a reason)"
        for source in sources
        if source.name != "fedmini" and layer_of(source.name) is None
    ]


def upward_imports(sources: Iterable[Source]) -> list[str]:
    problems = []
    for source in sources:
        own = layer_of(source.name)
        for found in imports_of(source):
            if found.target.split(".")[0] != "fedmini" or own is None or found.target == "fedmini.__version__":
                continue
            if _entry(found.target) == _entry(source.name) and found.target != source.name:
                continue  # inside one subpackage
            other = layer_of(found.target)
            if other is None:
                problems.append(f"{source.name}:{found.line} imports {found.target}: name the module that holds it")
            elif other >= own:
                problems.append(
                    f"{source.name}:{found.line} (layer {own}) imports {found.target} (layer {other}): "
                    "only strictly lower layers; pass it in as an argument, or move what is shared down"
                )
    return problems


def eager_imports(sources: Iterable[Source]) -> list[str]:
    """What `import fedmini` would load at once: its __init__ may import inside functions only."""
    problems = []
    for source in sources:
        if source.name != "fedmini":
            continue
        lazy = {
            found
            for node in ast.walk(source.tree)
            if isinstance(node, ast.FunctionDef) or _is_type_checking(node)
            for found in imports_of(source, node)
        }
        problems += [
            f"fedmini/__init__.py:{found.line} imports {found.target} when it is loaded: import it inside __getattr__"
            for found in imports_of(source)
            if found not in lazy and found.target.split(".")[0] not in {"typing", "importlib"}
        ]
    return problems


def import_cycles(sources: Sequence[Source]) -> list[str]:
    names = {source.name for source in sources}
    graph = {
        source.name: {_deepest(found.target, names) for found in imports_of(source)} - {None, source.name}
        for source in sources
        if source.name != "fedmini"
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return ["modules import each other in a circle: " + " <- ".join(error.args[1])]
    return []


def misplaced_libraries(sources: Iterable[Source]) -> list[str]:
    return [
        f"{source.name}:{found.line} imports {found.target}: only {', '.join(HOMES[library])} may import {library}"
        for source in sources
        for found in imports_of(source)
        if (library := found.target.split(".")[0]) in HOMES and not _lies_in(source.name, HOMES[library])
    ]


def undeclared_libraries(sources: Iterable[Source], declared: frozenset[str]) -> list[str]:
    installed = importlib.metadata.packages_distributions()
    problems = []
    sources = tuple(sources)
    scripts = {source.name.rpartition(".")[2] for source in sources if not _lies_in(source.name, ("fedmini",))}
    for source in sources:
        for found in imports_of(source):
            library = found.target.split(".")[0]
            if library in {"fedmini", "_typeshed"} or library in sys.stdlib_module_names:
                continue
            if library in scripts:  # a script beside it
                continue
            packages = {_normal(package) for package in installed.get(library, [library])}
            if not packages & declared:
                problems.append(f"{source.name}:{found.line} imports {library}: declare it in pyproject.toml")
    return problems


def unsafe_loading(sources: Iterable[Source]) -> list[str]:
    """Pickle by any of its names: the modules, torch.load and torch.save, allow_pickle."""
    problems = []
    for source in sources:
        found = [(one.line, one.target) for one in imports_of(source) if one.target.split(".")[0] in PICKLERS]
        found += [(one.line, one.target) for one in imports_of(source) if one.target in {"torch.load", "torch.save"}]
        for node in ast.walk(source.tree):
            if (
                isinstance(node, ast.Attribute)
                and node.attr in {"load", "save"}
                and _root(node) in _torch_names(source)
            ):
                found.append((node.lineno, f"torch's {node.attr}"))
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and not _is_false(node.value):
                found.append((node.value.lineno, "allow_pickle"))
        problems += [
            f"{source.name}:{line} uses {what}: no pickle anywhere (safetensors, JSON)" for line, what in found
        ]
    return problems


def weak_generators(sources: Iterable[Source]) -> list[str]:
    problems = []
    for source in sources:
        if not _lies_in(source.name, CRYPTOGRAPHIC_ONLY):
            continue
        found = [
            (one.line, one.target) for one in imports_of(source) if _lies_in(one.target, ("random", "numpy.random"))
        ]
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Attribute) and node.attr == "random" and _root(node) in {"np", "numpy"}:
                found.append((node.lineno, "numpy.random"))
        problems += [f"{source.name}:{line} uses {what}: draw from a RandomStream" for line, what in found]
    return problems


def oversized(sources: Iterable[Source], module_lines: int = MODULE_LINES) -> list[str]:
    problems = []
    for source in sources:
        if source.num_lines > module_lines:
            problems.append(f"{source.name} has {source.num_lines} lines, at most {module_lines}: one thing each")
        for node in ast.walk(source.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if num_lines > FUNCTION_LINES:
                    problems.append(
                        f"{source.name}:{node.lineno} {node.name} has {num_lines} lines, at most {FUNCTION_LINES}"
                    )
    return problems


def empty_names(sources: Iterable[Source]) -> list[str]:
    """Files and classes whose name does not say what they are."""
    problems = []
    for source in sources:
        for part in source.name.split(".")[1:]:
            if part in NAMES_THAT_NAME_NOTHING or WORDS_THAT_NAME_NOTHING.intersection(part.split("_")):
                problems.append(f"{source.name}: the name {part} says nothing; name what is in it")
        problems += [
            f"{source.name}:{node.lineno} class {node.name}: name what it is"
            for node in ast.walk(source.tree)
            if isinstance(node, ast.ClassDef) and node.name.endswith(CLASS_SUFFIXES_THAT_NAME_NOTHING)
        ]
    return problems


def _absolute_package(source: Source, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module or ""
    parts = source.name.split(".")
    keep = len(parts) - node.level + (1 if source.is_package else 0)
    return ".".join([*parts[:keep], *([node.module] if node.module else [])])


def _entry(module: str) -> str | None:
    return next((entry for entry in LAYERS if _lies_in(module, (entry,))), None)


def _lies_in(module: str, packages: Iterable[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _deepest(target: str, names: set[str]) -> str | None:
    parts = target.split(".")
    return next((name for end in range(len(parts), 1, -1) if (name := ".".join(parts[:end])) in names), None)


def _last_name(node: ast.expr) -> str | None:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else None


def _root(node: ast.expr) -> str | None:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def _torch_names(source: Source) -> set[str]:
    """What a module calls torch, or a submodule of it."""
    names = set()
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or "torch" for alias in node.names if alias.name.split(".")[0] == "torch"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def _is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and _last_name(node.test) == "TYPE_CHECKING"


def _normal(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def _declared_packages() -> frozenset[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = list(chain(project["dependencies"], *project["optional-dependencies"].values()))
    return frozenset(_normal(re.split(r"[^\w.-]", requirement, maxsplit=1)[0]) for requirement in requirements)


LIBRARY = read_sources(ROOT / "fedmini")
APPS = tuple(source for name in ("clients", "server", "simulations") for source in read_sources(ROOT / name))
UNDECLARED = frozenset(
    {"pfl", "tests"}
)  # what benchmarks stand beside, in a virtual environment of its own; the tests' runs
BENCHMARKS = tuple(source for source in APPS if source.name.startswith("simulations.benchmarks"))


def test_the_checks_see_the_library() -> None:
    assert {"fedmini.errors", "fedmini.types", "fedmini.config"} <= {source.name for source in LIBRARY}


def test_every_module_has_a_layer() -> None:
    assert unknown_modules(LIBRARY) == []


def test_modules_import_strictly_lower_layers() -> None:
    assert upward_imports(LIBRARY) == []


def test_every_folder_of_modules_is_a_package_and_so_reaches_the_wheel() -> None:
    folders = {path.parent for path in (ROOT / "fedmini").rglob("*.py")}
    assert [str(folder.relative_to(ROOT)) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert import_cycles(LIBRARY) == []


def test_importing_fedmini_imports_nothing_heavy() -> None:
    assert eager_imports(LIBRARY) == []


def test_each_library_is_imported_only_where_it_belongs() -> None:
    assert misplaced_libraries(LIBRARY) == []


def test_every_imported_library_is_declared() -> None:
    assert undeclared_libraries(LIBRARY + APPS, _declared_packages() | UNDECLARED) == []


def test_there_is_no_pickle_anywhere() -> None:
    assert unsafe_loading(LIBRARY + APPS) == []


def test_privacy_and_secure_aggregation_use_no_ordinary_random_generator() -> None:
    assert weak_generators(LIBRARY) == []


def test_modules_and_functions_stay_readable_in_one_sitting() -> None:
    for source in LIBRARY:
        if source.num_lines > MODULE_LINES_AIM:
            warnings.warn(f"{source.name} has {source.num_lines} lines; the aim is {MODULE_LINES_AIM}", stacklevel=1)
    assert oversized(LIBRARY) == []


def test_apps_are_thin() -> None:
    assert oversized(set(APPS) - set(BENCHMARKS), APP_LINES) == []
    assert oversized(BENCHMARKS) == []


def test_names_say_what_is_inside() -> None:
    assert empty_names(LIBRARY + APPS) == []


def test_contributing_shows_the_same_layers() -> None:
    rows = re.findall(r"^\| (\d+) \| (.+?) \|", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE)
    shown = {
        f"fedmini.{name.removesuffix('.py').rstrip('/')}": int(layer)
        for layer, names in rows
        for name in re.findall(r"`([^`]+)`", names)
    }
    assert shown == LAYERS


# The checks themselves: each must find what breaks its rule, and let the allowed neighbour pass.


def module(name: str, text: str, is_package: bool = False) -> tuple[Source, ...]:
    return (Source(name, text, is_package),)


def test_a_module_outside_the_table_is_found_and_the_table_is_named() -> None:
    (problem,) = unknown_modules(module("fedmini.novelty", ""))
    assert "fedmini.novelty" in problem and "LAYERS in tests/test_architecture.py" in problem
    assert unknown_modules(module("fedmini.privacy.anything", "")) == []


def test_imports_upward_and_sideways_are_found_however_they_are_written() -> None:
    for text in (
        "from fedmini import rounds",
        "import fedmini.rounds",
        "from fedmini.rounds import train",
        "from . import rounds",
        "from .rounds import train",
        "def later():\n    from fedmini import rounds",
        "import importlib\nimportlib.import_module('fedmini.rounds')",
        "from fedmini import store",
        "from fedmini import simulation_of_something",
    ):
        assert len(upward_imports(module("fedmini.data", text))) == 1, text
    assert len(upward_imports(module("fedmini.privacy.ledger", "from .. import rounds"))) == 1
    assert len(upward_imports(module("fedmini.privacy", "from ..rounds import train", is_package=True))) == 1


def test_imports_downward_and_inside_a_subpackage_are_allowed() -> None:
    assert upward_imports(module("fedmini.data", "from fedmini import errors, types\nimport fedmini.config")) == []
    assert (
        upward_imports(module("fedmini.privacy.ledger", "from . import noise\nfrom ..errors import StateError")) == []
    )
    assert upward_imports(module("fedmini.cli", "from fedmini import __version__")) == []


def test_a_circle_inside_a_subpackage_is_found() -> None:
    first = Source("fedmini.model.lora", "from fedmini.model import loading")
    assert import_cycles([first, Source("fedmini.model.loading", "import gguf")]) == []
    assert len(import_cycles([first, Source("fedmini.model.loading", "from . import lora")])) == 1
    package = Source("fedmini.model", "from .lora import LoraModel", is_package=True)
    assert len(import_cycles([package, Source("fedmini.model.lora", "from fedmini.model import LoraModel")])) == 1


def test_a_package_that_imports_on_load_is_found() -> None:
    assert len(eager_imports(module("fedmini", "from fedmini.simulation import simulate", True))) == 1
    lazy = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import fedmini.cli\ndef f():\n    import torch\n"
    assert eager_imports(module("fedmini", lazy, True)) == []


def test_a_library_outside_its_home_is_found() -> None:
    assert len(misplaced_libraries(module("fedmini.rounds", "import torch.nn"))) == 1
    assert len(misplaced_libraries(module("fedmini.simulation", "def f():\n    from flwr.app import Message"))) == 1
    assert len(misplaced_libraries(module("fedmini.privacy.clipping", "from cryptography.hazmat import x"))) == 1
    assert len(misplaced_libraries(module("fedmini.modeling", "import peft"))) == 1
    assert misplaced_libraries(module("fedmini.model.lora", "import torch, peft, transformers")) == []


def test_an_undeclared_library_is_found() -> None:
    declared = frozenset({"numpy"})
    assert len(undeclared_libraries(module("fedmini.data", "import json, numpy, requests"), declared)) == 1
    assert (
        undeclared_libraries(module("fedmini.data", "import json, numpy\nfrom fedmini import errors"), declared) == []
    )


def test_pickle_is_found_by_each_of_its_names() -> None:
    for text in (
        "import pickle",
        "from pickle import loads",
        "import torch as t\nt.load('x')",
        "import torch\ntorch.save(1, 'x')",
        "from torch import load",
        "import torch.jit\ntorch.jit.load('x')",
        "np.load('x', allow_pickle=True)",
        "np.load('x', allow_pickle=flag)",
    ):
        assert len(unsafe_loading(module("fedmini.model.loading", text))) >= 1, text
    safe = "import json, torch\njson.load(file)\nnp.load('x', allow_pickle=False)\nmodel.save('x')"
    assert unsafe_loading(module("fedmini.model.loading", safe)) == []


def test_an_ordinary_random_generator_is_found_in_privacy_only() -> None:
    for text in ("import random", "from numpy.random import default_rng", "np.random.default_rng()"):
        assert len(weak_generators(module("fedmini.privacy.noise", text))) == 1, text
        assert weak_generators(module("fedmini.data", text)) == []


def test_a_long_module_and_a_long_function_are_found() -> None:
    assert len(oversized(module("fedmini.data", "x = 1\n" * (MODULE_LINES + 1)))) == 1
    assert oversized(module("fedmini.data", "x = 1\n" * MODULE_LINES)) == []
    assert len(oversized(module("fedmini.data", "def f():\n" + "    x = 1\n" * FUNCTION_LINES))) == 1
    assert oversized(module("fedmini.data", "def f():\n" + "    x = 1\n" * (FUNCTION_LINES - 1))) == []
    assert len(oversized(module("clients.app", "x = 1\n" * (APP_LINES + 1)), APP_LINES)) == 1


def test_a_name_that_says_nothing_is_found() -> None:
    for name in ("fedmini.utils", "fedmini.model.base", "fedmini.common", "fedmini.privacy.noise_helpers"):
        assert len(empty_names(module(name, ""))) == 1, name
    assert len(empty_names(module("fedmini.data", "class DataManager: ..."))) == 1
    assert empty_names(module("fedmini.model.base_weights", "class Base: ...")) == []
