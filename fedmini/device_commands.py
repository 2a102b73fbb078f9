"""`fedmini device ...`: what a device's owner does with its folder. Heavy imports happen inside commands."""

import json
import math
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from fedmini.errors import ConfigError, UpdateError

if TYPE_CHECKING:
    from fedmini.enrolment import Enrolment
    from fedmini.types import Manifest, UnitPlan

device = typer.Typer(help="Enrol a device, agree to runs, see what they cost.", rich_markup_mode=None)

# About what a device sends in a round beside its vector, for each device of it: two shares, sealed, what it commits to
# them with, and one share in the end.
SHARES_BYTES = 256

Found = TypeVar("Found")
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The device's own folder.")]


@device.command()
def init(folder: Folder) -> None:
    """Make a device's signing key, which never leaves it."""
    from fedmini import operator_keys

    public_key = operator_keys.create_device(folder)
    typer.echo(f"Made {folder}: the device's key, and its public half {public_key.hex()}.")
    typer.echo(
        f"device.key stays here. Next: send {_quoted(folder / 'device.pub')} to the operator, who enrols it with\n"
        "  fedmini operator certify DIR device.pub --name NAME --output certificate.json\n"
        "and take the answer, with the operator's public key:\n"
        f"  fedmini device enrol {_quoted(folder)} certificate.json operator.pub"
    )


@device.command()
def enrol(
    folder: Folder,
    certificate: Annotated[Path, typer.Argument(metavar="CERTIFICATE.json", help="From `fedmini operator certify`.")],
    operator_key: Annotated[Path, typer.Argument(metavar="OPERATOR.pub", help="The operator's public key.")],
) -> None:
    """Enrol this device with an operator, whose signature is all that it believes from then on."""
    from fedmini import enrolment, operator_keys
    from fedmini.secagg import trust_text

    found = _parse(certificate, trust_text.read_certificate)
    public_key = operator_keys.read_public_key(operator_key)
    enrolment.enrol(folder, found, public_key)
    typer.echo(f"Enrolled as {found.device_id} with the operator {public_key.hex()}.")
    typer.echo(
        "Compare that key with the operator in person: the device believes whoever has it.\n"
        f"Next: fedmini device accept {_quoted(folder)} SIGNED.json, for each run that the device shall be part of."
    )


@device.command()
def accept(
    folder: Folder,
    signed: Annotated[
        Path, typer.Argument(metavar="SIGNED.json", help="A manifest, from `fedmini operator sign-manifest`.")
    ],
    yes: Annotated[bool, typer.Option("--yes", help="Agree without being asked.")] = False,
) -> None:
    """Say what a run may cost this device, and agree to it."""
    from fedmini import enrolment
    from fedmini.secagg import trust_text

    found = _parse(signed, trust_text.read_signed_manifest)
    with enrolment.opened(folder) as own:
        is_new = found.manifest.hash not in own.manifests
        own.check(found)
        for line in _describe(found.manifest, own):
            typer.echo(line)
        if is_new and not yes and not _agrees():
            typer.echo("Not accepted: nothing was changed.")
            raise typer.Exit(1)
        own.accept(found)
    typer.echo(f"Accepted run {found.manifest.run_id}." if is_new else "This device had agreed to it before.")


@device.command()
def status(folder: Folder) -> None:
    """Whom this device believes, what it agreed to, and what has left it so far."""
    from fedmini import enrolment
    from fedmini.privacy import accounting

    with enrolment.opened(folder) as own, own.ledger() as ledger:
        for line in _standing(own):
            typer.echo(line)
        for name, manifest in own.manifests.items():
            done, most = ledger.num_participations(manifest.run_id), manifest.release.max_releases
            typer.echo(f"run            {manifest.run_id}: {done} of at most {most} contributions; manifest {name}")
        if not own.manifests:
            typer.echo("run            none accepted")
        typer.echo(f"contributions  {len(ledger.releases())}, over all runs")
        limit, delta = own.lifetime.lifetime_epsilon, own.lifetime.lifetime_delta
        for unit in ("example", "device"):
            spent = accounting.rounded_up(ledger.epsilon(unit, delta))
            typer.echo(f"spent          {unit} epsilon {spent} of {limit:g} in a lifetime, at delta {delta:g}")


@device.command()
def follow(
    folder: Folder,
    signed: Annotated[
        list[Path],
        typer.Argument(
            metavar="ROTATIONS.json [REVOCATIONS.json] [CERTIFICATE.json]",
            help="What the operator signed: any of the three, those of after a rotation together.",
        ),
    ],
) -> None:
    """Follow the operator to its current key, and take its newest list of revoked devices."""
    from fedmini import enrolment
    from fedmini.secagg import trust_text

    readers: dict[str, Callable[[bytes], Any]] = {
        "rotations": trust_text.read_rotations,
        "revocations": trust_text.read_revocations,
        "certificate": trust_text.read_certificate,
    }
    found: dict[str, Any] = {}
    for path in signed:
        kind = _kind(path)
        if kind not in readers or kind in found:
            raise ConfigError(f"{path}: expected rotations, revocations or a certificate, one file of each")
        found[kind] = _parse(path, readers[kind])
    with enrolment.opened(folder) as own:
        own.follow(found.get("rotations", ()), found.get("revocations"), found.get("certificate"))
        for line in _standing(own):
            typer.echo(line)


def _standing(own: "Enrolment") -> Iterator[str]:
    """Who the device is, and whom it believes."""
    from fedmini.errors import ProtocolError

    certificate, keys = own.identity.certificate, own.believed.operator_keys
    yield f"device         {certificate.device_id}, key {certificate.device_key.hex()}"
    later = f", which followed the one of the enrolment, {keys[0].hex()[:16]}..." if len(keys) > 1 else ""
    yield f"operator       {keys[-1].hex()}{later}"
    try:
        own.trust.check_certificate(certificate)
        yield "certificate    by this operator key"
    except ProtocolError as error:
        yield f"certificate    NOT VALID: {error}; this device takes no part"
    number = own.trust.revocations_sequence
    yield f"revocations    number {number}" if number else "revocations    none seen"


def _describe(manifest: "Manifest", own: "Enrolment") -> Iterator[str]:
    """What a run may cost this device, every number by its own accountant."""
    from fedmini import sums

    release = manifest.release
    upload = sums.upload_bytes(manifest) + SHARES_BYTES * release.max_devices
    yield f"run            {manifest.run_id}, manifest {manifest.hash}"
    yield (
        f"takes part     at most {release.max_releases} times, lost attempts counted, in {manifest.num_rounds} rounds of "
        f"about {release.cohort_size} devices"
    )
    yield f"sends          about {upload:,} bytes each time, {upload * release.max_releases:,} in all"
    for unit in release.units:
        yield from _describe_unit(unit, manifest, own)


def _describe_unit(unit: "UnitPlan", manifest: "Manifest", own: "Enrolment") -> Iterator[str]:
    from fedmini import floors, statement
    from fedmini.privacy import accounting
    from fedmini.types import ADJACENCY

    shown = accounting.rounded_up
    limit, delta = own.lifetime.lifetime_epsilon, own.lifetime.lifetime_delta
    with own.ledger() as ledger:
        spent = ledger.epsilon(unit.unit, delta)
    after = own.epsilon_after(manifest, unit)
    cost = shown(floors.run_epsilon(unit, manifest))
    yield f"may cost       {unit.unit} epsilon {cost} at delta {unit.target_delta:g}, for {ADJACENCY[unit.unit]}"
    yield f"  noise        {unit.noise}, {unit.z_eff:.4f} times the clip norm {unit.clip_norm:g}"
    yield f"  against      {statement.holds_against(unit)}"
    yield f"  lone         epsilon {shown(floors.lone_epsilon(unit, manifest))}, were nobody else honest, nor the server"
    yield (
        f"  lifetime     epsilon {shown(spent)} of {limit:g} is spent at delta {delta:g}, {_left(limit, spent)} is left; "
        f"{shown(after)} after the whole run"
    )
    if after > limit:
        yield "               that is above the limit: this device stops before"


def _left(limit: float, spent: float) -> str:
    """What is left of a limit, rounded down."""
    return f"{math.floor(max(0.0, limit - spent) * 1000 + 1e-6) / 1000:.3f}"


def _agrees() -> bool:
    if not sys.stdin.isatty():
        raise ConfigError("nobody is at the terminal to agree: read the above, then add --yes")
    typer.echo("Agree? [y/N] ", nl=False)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _parse(path: Path, parse: Callable[[bytes], Found]) -> Found:
    from fedmini import operator_keys

    try:
        return parse(operator_keys.read_file(path))
    except UpdateError as error:
        raise ConfigError(f"{path}: {error}") from None


def _kind(path: Path) -> str:
    """What a file says that it is: `rotations`, say; empty where it says nothing."""
    from fedmini import operator_keys

    try:
        found = json.loads(operator_keys.read_file(path))
    except (ValueError, RecursionError):
        return ""
    name = found.get("format") if isinstance(found, dict) else None
    return name.removeprefix("fedmini/").removesuffix("/v1") if isinstance(name, str) else ""


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
