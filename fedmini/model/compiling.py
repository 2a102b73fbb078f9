"""From C++ sources to one library in the cache, built on first use by the compiler that is there.

One library is kept for each version of the sources, of torch and of the flags, and for each level that torch runs at
(AVX-512, AVX2, neither): a cache that different processors share hands none of them what only another can run.
"""

import hashlib
import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fedmini.errors import ConfigError
from fedmini.model import cache

_SOURCES = tuple(Path(__file__).with_name(name) for name in ("dequantise.cpp", "layers.cpp"))
_HEADERS = (Path(__file__).with_name("lanes.h"),)
_LIBRARY = "fedmini_kernels.so"
_FLAGS = ("-O3", "-ffp-contract=off", *(("-fopenmp",) if sys.platform == "linux" else ()))
_FLAGS_OF_LEVEL = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"),
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
}
_REMEDY = "a C++ compiler, and pip install 'fedmini[native]', build the faster one"


def library(cache_dir: Path, note: Callable[[str], None]) -> Path:
    """The kernel's library for this machine, under TORCH_EXTENSIONS_DIR if that is set, else under `cache_dir`.

    Safe where several processes build at once: one result stays. A damaged one is built again, and `note` hears it.
    Raises ConfigError, in one line, where there is none and none can be built.
    """
    root = os.environ.get("TORCH_EXTENSIONS_DIR")  # torch's own variable for where such libraries lie
    flags = _FLAGS + _FLAGS_OF_LEVEL.get(torch.backends.cpu.get_cpu_capability(), ())
    places = Path(root) / "fedmini" if root else cache_dir
    return cache.open_or_build(places, _key(flags), partial(_build, flags), note, kind="kernels").folder / _LIBRARY


def _key(flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for part in (*flags, torch.__version__, sys.platform, platform.machine()):
        digest.update(part.encode() + b"\0")
    for source in (*_SOURCES, *_HEADERS):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _build(flags: tuple[str, ...], folder: Path) -> Mapping[str, Any]:
    _find_compiler()
    with _scripts_on_the_path():
        try:
            from torch.utils.cpp_extension import load  # imports setuptools: only where something is built

            load(
                name=Path(_LIBRARY).stem,
                sources=[str(source) for source in _SOURCES],
                extra_cflags=list(flags),
                extra_ldflags=[flag for flag in flags if flag == "-fopenmp"],
                build_directory=str(folder),
                is_python_module=False,
            )
            (built,) = folder.glob("*.so")
        except Exception as error:  # whatever setuptools, ninja or the compiler stumble on
            raise ConfigError(f"it could not be compiled ({_first_line(error)}); {_REMEDY}") from error
    built.rename(folder / _LIBRARY)
    for left_over in folder.iterdir():
        if left_over.name != _LIBRARY:
            left_over.unlink()
    return {"torch": torch.__version__, "flags": list(flags)}


def _find_compiler() -> None:
    """Raises ConfigError where there is none: before anything slow is tried."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        raise ConfigError(f"there is no compiler {compiler!r}; {_REMEDY}")


@contextmanager
def _scripts_on_the_path() -> Iterator[None]:
    """A ninja from pip lies beside this Python, which need not be on the path."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join((before, sysconfig.get_path("scripts")))
    try:
        yield
    finally:
        os.environ["PATH"] = before


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
