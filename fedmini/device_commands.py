"""`fedmini device ...`: what a device's owner does with its folder. Heavy imports happen inside commands."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmini.command_help import HelpedCommand
from fedmini.errors import ConfigError
from fedmini.phrases import quoted

if TYPE_CHECKING:
    from fedmini.enrolment import Enrolment

device = typer.Typer(help="Enrol a device, agree to runs, see what they cost.", rich_markup_mode=None)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The device's own folder.")]


@device.command(cls=HelpedCommand)
def init(folder: Folder) -> None:
    """Make a device's keys, which never leave it."""
    from fedmini import operator_keys

    public_key = operator_keys.create_device(folder)
    typer.echo(f"Made {folder}: the device's key, and its public half {public_key.hex()}.")
    typer.echo(
        f"device.key and login.key stay here. Next: send {quoted(folder / 'device.pub')} to the operator, who enrols it with\n"
        "  fedmini operator certify DIR device.pub --name NAME --output certificate.json\n"
        "and take the answer, with the operator's public key:\n"
        f"  fedmini device enrol {quoted(folder)} certificate.json operator.pub"
    )


@device.command(cls=HelpedCommand)
def enrol(
    folder: Folder,
    certificate: Annotated[Path, typer.Argument(metavar="CERTIFICATE.json", help="From `fedmini operator certify`.")],
    operator_key: Annotated[Path, typer.Argument(metavar="OPERATOR.pub", help="The operator's public key.")],
) -> None:
    """Enrol this device with an operator.

    The operator's signature is all that the device believes from then on.
    """
    from fedmini import enrolment, operator_keys
    from fedmini.operator_keys import signed_files
    from fedmini.secagg import trust_text

    if signed_files.is_public_key(certificate):
        raise ConfigError(f"{certificate} is a public key: the order is DIR CERTIFICATE.json OPERATOR.pub")
    found = signed_files.parse(certificate, trust_text.read_certificate)
    public_key = operator_keys.read_public_key(operator_key)
    enrolment.enrol(folder, found, public_key)
    typer.echo(f"Enrolled as {found.device_id} with the operator {public_key.hex()}.")
    typer.echo(
        "Compare that key with the operator in person: the device believes whoever has it.\n"
        f"Next: fedmini device accept {quoted(folder)} SIGNED.json, for each run that the device shall be part of."
    )


@device.command("new-login", cls=HelpedCommand)
def new_login(folder: Folder) -> None:
    """Make another key to log in with.

    The device stays enrolled, and servers have to be told.
    """
    from fedmini import enrolment

    enrolment.new_login(folder)
    public_keys = quoted(folder / "device.pub")
    typer.echo(f"Made another login key in {folder}; the device's key and its certificate stay as they are.")
    typer.echo(
        f"Next: give {public_keys} to the server, which takes the old login key until its operator enrols the new one with\n"
        "  fedmini server enroll DIR DEVICE.pub --certificate CERTIFICATE.json"
    )


@device.command(cls=HelpedCommand)
def accept(
    folder: Folder,
    signed: Annotated[
        Path, typer.Argument(metavar="SIGNED.json", help="A manifest, from `fedmini operator sign-manifest`.")
    ],
    yes: Annotated[bool, typer.Option("--yes", help="Agree without being asked.")] = False,
) -> None:
    """Say what a run may cost this device, and agree to it."""
    from fedmini import enrolment
    from fedmini.enrolment import bargain
    from fedmini.operator_keys import signed_files
    from fedmini.secagg import trust_text

    if _is_unsigned(signed):
        raise ConfigError(
            f"{signed} is not signed: this device's operator has to, with `fedmini operator sign-manifest DIR {signed}`"
        )
    found = signed_files.parse(signed, trust_text.read_signed_manifest)
    with enrolment.opened(folder) as own:
        is_new = found.manifest.hash not in own.manifests
        own.check(found)
        for line in bargain.describe(found.manifest, own):
            typer.echo(line)
        if is_new and not yes and not _agrees("Agree?", "agree"):
            typer.echo("Not accepted: nothing was changed.")
            raise typer.Exit(1)
        own.accept(found)
    typer.echo(f"Accepted run {found.manifest.run_id}." if is_new else "This device had agreed to it before.")


@device.command(cls=HelpedCommand)
def withdraw(
    folder: Folder,
    manifest_hash: Annotated[
        str, typer.Argument(metavar="HASH", help="The manifest's, as `fedmini device status` shows it.")
    ],
    yes: Annotated[bool, typer.Option("--yes", help="Leave without being asked.")] = False,
) -> None:
    """Leave a run, for good; what was spent stays spent."""
    from fedmini import enrolment

    with enrolment.opened(folder) as own:
        run_id = own.manifest(manifest_hash).run_id
        if not yes and not _agrees(f"Leave run {run_id} for good?", "leave the run"):
            typer.echo("Not left: nothing was changed.")
            raise typer.Exit(1)
        own.withdraw(manifest_hash)
    typer.echo(f"Left run {run_id}, for good: this device can't join it again. What it has spent stays spent.")


@device.command(cls=HelpedCommand)
def status(folder: Folder) -> None:
    """Whom this device believes, and what has left it so far."""
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


@device.command(cls=HelpedCommand)
def follow(
    folder: Folder,
    signed: Annotated[
        list[Path],
        typer.Argument(
            metavar="SIGNED.json...",
            help="What the operator signed, one file of each: rotations, revocations, this device's certificate. Those of "
            "after a rotation belong together.",
        ),
    ],
) -> None:
    """Take the operator's current key and revocations."""
    from fedmini import enrolment
    from fedmini.operator_keys import signed_files

    found = signed_files.read_signed(signed)
    with enrolment.opened(folder) as own:
        own.follow(found.rotations, found.revocations, *found.certificates)
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


def _agrees(question: str, what: str) -> bool:
    if not sys.stdin.isatty():
        raise ConfigError(f"nobody is at the terminal to {what}: read the above, then add --yes")
    typer.echo(f"{question} [y/N] ", nl=False)
    answer = ""
    try:
        answer = sys.stdin.readline()
    finally:
        if not answer.endswith("\n"):  # Ctrl-C or Ctrl-D: what is said next begins on a line of its own
            typer.echo()
    return answer.strip().lower() in ("y", "yes")


def _is_unsigned(path: Path) -> bool:
    """Whether this is a manifest as it was planned, or the record of one in a run's directory."""
    from fedmini.operator_keys import signed_files

    found = signed_files.fields(path).keys()
    return {"run_id", "release"} <= found or {"hash", "environment", "manifest"} == found
