"""A run's files on the server: its configuration, the manifest that the operator signed, and what `rundir` keeps."""

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedmini import config as configuration
from fedmini import manifest_file, planning, rundir
from fedmini.config import RunConfig
from fedmini.errors import ConfigError, StateError, UpdateError
from fedmini.model import runtime
from fedmini.phrases import quoted
from fedmini.rundir import RunDirectory
from fedmini.secagg import signed_manifest, trust_text
from fedmini.secagg.signed_manifest import SignedManifest
from fedmini.secagg.trust import Trust
from fedmini.types import Manifest

SIGNED = "manifest.signed.json"


@dataclass(frozen=True, slots=True)
class RunFiles:
    """A run that is ready to be served: its configuration and manifest belong together, and the operator signed it."""

    directory: RunDirectory
    config: RunConfig
    signed: SignedManifest

    @property
    def manifest(self) -> Manifest:
        return self.signed.manifest

    @property
    def aggregates(self) -> Path:
        """Where the sum of the round that goes on is kept."""
        return self.directory.path / "aggregate"


def open_run(folder: Path, trust: Trust) -> RunFiles:
    """A run's files, checked against each other.

    Raises ConfigError where a file is missing or the run was planned otherwise, ProtocolError where the signature is
    not the operator's.
    """
    directory = RunDirectory(folder)
    if not directory.config.exists():
        raise ConfigError(f"{folder} holds no run: plan it with `fedmini server start DIR RUN.toml`")
    config = configuration.load_run_config(directory.config)
    signed = _read_signed(folder)
    signed_manifest.check_manifest_signature(trust.operator_key, signed)
    _check_same(config, signed.manifest, directory)
    return RunFiles(directory, config, signed)


def begin(files: RunFiles) -> None:
    """Write down what this run is, where it has not begun yet."""
    if not files.directory.metrics.exists():
        rundir.begin(files.directory, files.config, files.manifest, {"deployment": True})


def plan(config: RunConfig, note: Callable[[str], None]) -> dict[str, bytes]:
    """The files of a run that is planned now, for its folder: to be signed. Loads the base."""
    from fedmini.model import loading  # the supervisor opens runs too, and lives as long as they do: without PyTorch
    from fedmini.model.lora import LoraModel

    cache_dir = runtime.default_cache_dir()
    model = LoraModel(loading.load_base(config.base, cache_dir, note), planning.lora_shape(config))
    base = planning.Base(model.fingerprint, model.template)
    manifest = planning.make_manifest(config, f"{config.run.name}-{secrets.token_hex(4)}", base, cache_dir)
    return {
        "manifest.json": manifest_file.canonical(manifest),
        "config.toml": configuration.dump_run_config(config).encode(),
    }


def put(folder: Path, planned: Mapping[str, bytes]) -> None:
    """Put a planned run's files in place, the manifest last. Raises StateError."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StateError(f"can't make {folder}: {error.strerror}") from error
    for name in sorted(planned):
        rundir.replace(folder / name, planned[name], "give the same command again")


def check_asked(folder: Path, asked: RunConfig) -> None:
    """Raise ConfigError where the run in a folder was planned with other settings than these."""
    stored = configuration.load_run_config(folder / "config.toml")
    if stored != asked:
        names = [name for name in RunConfig.model_fields if getattr(asked, name) != getattr(stored, name)]
        raise ConfigError(
            f"{folder} was planned with other settings ({', '.join(names)} differ): put them back, or give the run another "
            "run.name, and plan and sign it anew"
        )


def _read_signed(folder: Path) -> SignedManifest:
    path = folder / SIGNED
    try:
        return trust_text.read_signed_manifest(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(
            f"the run in {folder} is not signed yet: give {quoted(folder / 'manifest.json')} to the operator, who signs it with "
            f"`fedmini operator sign-manifest OPERATOR manifest.json`, and put the answer at {quoted(path)}"
        ) from None
    except OSError as error:
        raise ConfigError(f"can't read {path}: {error.strerror}") from error
    except UpdateError as error:
        raise ConfigError(f"{path}: {error}") from None


def _check_same(config: RunConfig, manifest: Manifest, directory: RunDirectory) -> None:
    """Raise ConfigError where the configuration would give another manifest than the one that was signed."""
    base = planning.Base(manifest.base_fingerprint, manifest.template)
    again = planning.make_manifest(config, manifest.run_id, base, runtime.default_cache_dir())
    if again != manifest:
        raise ConfigError(
            f"{directory.config} would give another manifest than the one that the operator signed: put the settings back, or "
            "plan and sign the run anew"
        )
    if config.run.seed is not None:
        raise ConfigError(
            f"{directory.config} has a run.seed: a run that anybody can repeat protects nobody; remove it"
        )
