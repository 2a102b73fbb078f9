"""The TOML files of a run, a device and a server, read and written. Unknown keys are errors that name the nearest valid one."""

import difflib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import ValidationError

from fedmini.config.device_sections import DeviceConfig
from fedmini.config.sections import RunConfig, Section
from fedmini.config.server_sections import ServerConfig
from fedmini.errors import ConfigError

AnySection = TypeVar("AnySection", bound=Section)


def load_run_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's TOML file, with `section.key=value` overrides applied on top.

    A relative file name inside it (data, base, evaluation) is taken from the file's own folder.
    Raises ConfigError, in one line.
    """
    return _absolute_paths(parse_run_config(_read(path, overrides), str(path)), path.parent.resolve())


def parse_run_config(values: Mapping[str, Any], origin: str = "config") -> RunConfig:
    """A RunConfig from a mapping. Raises ConfigError that names every wrong key, and the nearest valid one."""
    return _parse(RunConfig, values, origin)


def load_device_config(path: Path, overrides: Sequence[str] = ()) -> DeviceConfig:
    """Read a device's TOML file, with `section.key=value` overrides applied on top. Raises ConfigError, in one line."""
    return parse_device_config(_read(path, overrides), str(path))


def parse_device_config(values: Mapping[str, Any], origin: str = "config") -> DeviceConfig:
    """A DeviceConfig from a mapping. Raises ConfigError that names every wrong key, and the nearest valid one."""
    return _parse(DeviceConfig, values, origin)


def load_server_config(path: Path, overrides: Sequence[str] = ()) -> ServerConfig:
    """Read a server's TOML file, with `section.key=value` overrides applied on top.

    A relative file name inside it is taken from the file's own folder. Raises ConfigError, in one line.
    """
    config = parse_server_config(_read(path, overrides), str(path))
    if config.tls.certificate is None or config.tls.private_key is None:
        return config
    folder = path.parent.resolve()
    names = {"certificate": config.tls.certificate, "private_key": config.tls.private_key}
    tls = config.tls.model_copy(update={name: _absolute(path, folder) for name, path in names.items()})
    return config.model_copy(update={"tls": tls})


def parse_server_config(values: Mapping[str, Any], origin: str = "config") -> ServerConfig:
    """A ServerConfig from a mapping. Raises ConfigError that names every wrong key, and the nearest valid one."""
    return _parse(ServerConfig, values, origin)


def dump_server_config(config: ServerConfig) -> str:
    """The whole configuration as TOML, defaults included, such that `load_server_config` gives it back."""
    return _dump(config)


def dump_run_config(config: RunConfig) -> str:
    """The whole configuration as TOML, defaults included, such that `load_run_config` gives it back."""
    return _dump(config)


def _dump(config: Section) -> str:
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def _read(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"can't read the config {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text") from error
    try:
        values = _loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    for override in overrides:
        _apply_override(values, override)
    return values


def _loads(text: str) -> dict[str, Any]:
    """TOML as values. Raises TOMLDecodeError, and ConfigError for what no setting could mean."""
    try:
        values = tomllib.loads(text)
        size = max((number.bit_length() for number in _integers(values)), default=0)
    except tomllib.TOMLDecodeError:
        raise
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, lists in lists in lists
        raise ConfigError("the TOML holds a number that is too long, or is nested too deeply") from error
    if size > 63:
        raise ConfigError("the TOML holds an integer of more than 64 bits")
    return values


def _integers(value: Any) -> Iterator[int]:
    if isinstance(value, int):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _integers(item)


def _parse(whole: type[AnySection], values: Mapping[str, Any], origin: str) -> AnySection:
    try:
        return whole.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(_explain(problem, whole) for problem in error.errors())
        raise ConfigError(f"{origin}: {problems}") from error


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"--set expects section.key=value, got {override!r}")
    try:
        value = _loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word is a string
    table = values
    for part in parts[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {key}: {part} is a value, not a section")
    if value == "unset":
        table.pop(parts[-1], None)
    else:
        table[parts[-1]] = value


def _absolute_paths(config: RunConfig, folder: Path) -> RunConfig:
    def absolute(source: str) -> str:
        is_file = source.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst"))
        return str(_absolute(Path(source), folder)) if is_file else source

    base = config.base
    if base.path is not None:
        base = base.model_copy(update={"path": _absolute(base.path, folder)})
    return config.model_copy(
        update={
            "base": base,
            "data": config.data.model_copy(update={"source": absolute(config.data.source)}),
            "evaluation": config.evaluation.model_copy(update={"source": absolute(config.evaluation.source)}),
        }
    )


def _absolute(path: Path, folder: Path) -> Path:
    try:
        return folder / path.expanduser()
    except RuntimeError as error:  # "~nobody/..."
        raise ConfigError(f"{path}: there is no such user here") from error


def _explain(problem: Any, whole: type[Section]) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    where = where if where.isprintable() else ascii(where)  # a key may hold what a terminal would obey
    match problem["type"]:
        case "extra_forbidden":
            known = _known_keys(problem["loc"][:-1], whole)
            nearest = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1, cutoff=0.5)
            hint = f"did you mean {nearest[0]}?" if nearest else f"known here: {', '.join(known)}"
            return f"unknown key {where}: {hint}"
        case "missing":
            return f"{where} is missing"
        case "value_error":
            reason = str(problem["ctx"]["error"])
            return f"{where}: {reason}" if where else reason
        case _:
            got = problem["input"]
            shown = f", got {got!r}" if isinstance(got, bool | int | float | str) else ""
            return f"{where}: {problem['msg'][0].lower()}{problem['msg'][1:]}{shown}"


def _known_keys(location: tuple[int | str, ...], whole: type[Section]) -> list[str]:
    section: Any = whole
    for part in location:
        candidates = [section.model_fields[str(part)].annotation]
        candidates += getattr(candidates[0], "__args__", ())
        section = next(item for item in candidates if isinstance(item, type) and issubclass(item, Section))
    return list(section.model_fields)
