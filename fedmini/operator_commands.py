"""`fedmini operator ...`: who enrols devices and signs manifests. Heavy imports happen inside commands."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmini.command_help import HelpedCommand
from fedmini.errors import ConfigError, ProtocolError, UpdateError
from fedmini.phrases import counted, quoted

if TYPE_CHECKING:
    from fedmini.types import Manifest

operator = typer.Typer(help="Enrol and revoke devices, sign manifests.", rich_markup_mode=None)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The operator's folder, kept away from the server.")]
PassphraseFile = Annotated[
    Path | None, typer.Option("--passphrase-file", help="A file whose first line is the key's passphrase.")
]


@operator.command(cls=HelpedCommand)
def init(
    folder: Folder,
    passphrase: Annotated[bool, typer.Option("--passphrase", help="Ask for a passphrase to encrypt the key.")] = False,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Make the signing key of a new operator."""
    from fedmini import operator_keys
    from fedmini.operator_keys import passphrase as passphrases

    secret = None
    if passphrase_file is not None:
        secret = passphrases.read_passphrase(passphrase_file)
    elif passphrase:
        secret = passphrases.ask_twice()
    public_key = operator_keys.create(folder, secret)
    state = "encrypted" if secret is not None else "not encrypted"
    typer.echo(f"Made {folder}: the operator's key ({state}) and its public half {public_key.hex()}.")
    typer.echo(
        "Who has operator.key can enrol devices and sign manifests: keep this folder off the server, with a backup.\n"
        f"Next: give {quoted(folder / 'operator.pub')} to every device, and enrol each with\n"
        f"  fedmini operator certify {quoted(folder)} DEVICE.pub --name NAME --output NAME.certificate.json"
    )


@operator.command(cls=HelpedCommand)
def certify(
    folder: Folder,
    device_keys: Annotated[Path, typer.Argument(metavar="DEVICE.pub", help="What `fedmini device init` made.")],
    name: Annotated[
        str | None, typer.Option("--name", help="What to call the device; or it is called after its key.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", help="Write the certificate here too.")] = None,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Enrol a device: sign its public key."""
    from fedmini import operator_keys
    from fedmini.operator_keys import passphrase
    from fedmini.secagg import trust_text

    _check_output(output)
    public_key = operator_keys.read_device_keys(device_keys).device_key
    with operator_keys.opened(folder, passphrase.asker(passphrase_file)) as opened:
        certificate = opened.certify(public_key, name)
        revoked = opened.revocations()
    written = folder / "devices" / f"{certificate.device_id}.json"
    if output is not None:
        operator_keys.write_file(output, trust_text.write_certificate(certificate))
        written = output
    typer.echo(
        f"Enrolled {certificate.device_id} with the key {public_key.hex()}: is it the one that the device shows?"
    )
    typer.echo(
        f"Next: give {quoted(written)} and {quoted(folder / 'operator.pub')} to the device, whose owner enrols it with\n"
        "  fedmini device enrol DIR CERTIFICATE.json OPERATOR.pub\n"
        f"and {quoted(written)} and {quoted(device_keys)} to the server, which knows the device after\n"
        f"  fedmini server enroll DIR DEVICE.pub --certificate CERTIFICATE.json"
    )
    if revoked is not None:
        typer.echo(_to_follow(folder))


@operator.command(cls=HelpedCommand)
def revoke(
    folder: Folder,
    name: Annotated[str, typer.Argument(metavar="NAME", help="An enrolled device, as in DIR/devices/NAME.json.")],
    passphrase_file: PassphraseFile = None,
) -> None:
    """Take a device's enrolment back, for good."""
    from fedmini import operator_keys
    from fedmini.operator_keys import passphrase

    with operator_keys.opened(folder, passphrase.asker(passphrase_file)) as opened:
        revocations = opened.revoke(name)
    typer.echo(f"Revoked {name}: it is on the list of revocations number {revocations.sequence} now.")
    typer.echo(
        f"Next: give {quoted(folder / 'revocations.json')} to the server, which passes it on in the next round.\n"
        "A server that lies can keep it back from devices that have not seen it: in runs whose manifest was signed before, and\n"
        "with that old signature. Manifests of new runs are signed with it; where a server is suspected, end its runs."
    )


@operator.command(cls=HelpedCommand)
def rotate(folder: Folder, passphrase_file: PassphraseFile = None) -> None:
    """Put a new key in the old one's place, signed by it.

    All certificates and revocations are signed anew.
    """
    from fedmini import operator_keys
    from fedmini.operator_keys import passphrase

    public_key = operator_keys.rotate(folder, passphrase.asker(passphrase_file))
    enrolled = len(list((folder / "devices").glob("*.json")))
    typer.echo(f"The operator's key is now {public_key.hex()}; certificates signed anew: {enrolled}.")
    typer.echo(
        "The old key is removed: it has nothing left to sign, and a thief of it could lead devices elsewhere. Where it was\n"
        "stolen already, a rotation is not enough: begin a new folder, and enrol every device again.\n"
        "Next: sign the manifests of running runs again, give operator.pub to devices that are enrolled from now on, and to\n"
        f"the server and the devices of before, from {quoted(folder)}, what devices follow with\n"
        f"  fedmini device follow DIR {_after_rotation(folder, enrolled)}"
    )


@operator.command("sign-manifest", cls=HelpedCommand)
def sign_manifest(
    folder: Folder,
    manifest: Annotated[
        Path, typer.Argument(metavar="MANIFEST.json", help="From `fedmini plan --manifest`, or a run directory's.")
    ],
    output: Annotated[Path | None, typer.Option("--output", help="Or MANIFEST.signed.json beside it.")] = None,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Sign what devices agree to, after saying what it is.

    What no device would agree to is not signed.
    """
    from fedmini import floors, operator_keys
    from fedmini.operator_keys import passphrase
    from fedmini.secagg import trust_text

    operator_keys.check_folder(folder)
    _check_output(output)
    found = _read_manifest(manifest)
    try:
        floors.check(found, floors.COMPILED)
    except ProtocolError as error:
        why = str(error).split("; ", 1)[0]  # what follows there is what a device's owner can do
        raise ConfigError(f"{manifest}: no device would agree to it: {why}; plan the run anew") from error
    for line in _describe(found):
        typer.echo(line)
    with operator_keys.opened(folder, passphrase.asker(passphrase_file)) as opened:
        signed = opened.sign_manifest(found)
    written = output or manifest.with_suffix(".signed.json")
    operator_keys.write_file(written, trust_text.write_signed_manifest(signed))
    typer.echo(f"Signed it, for devices that have seen revocations number {signed.min_revocations} or later.")
    typer.echo(f"Next: give {quoted(written)} to the server, which passes it on to the devices.")
    if signed.min_revocations > 0:
        typer.echo(_to_follow(folder))


def _check_output(output: Path | None) -> None:
    """Raise ConfigError, before anything is done, where there is no folder to write to."""
    if output is not None and not output.parent.is_dir():
        raise ConfigError(f"can't write {output}: there is no folder {output.parent}; make it first")


def _to_follow(folder: Path) -> str:
    """What a device has to see before it accepts a manifest that is signed now."""
    newest = quoted(folder / "revocations.json")
    return f"Devices that have not seen {newest} need it too:\n  fedmini device follow DIR REVOCATIONS.json"


def _after_rotation(folder: Path, enrolled: int) -> str:
    """The files that a device follows a rotation with, of those that there are."""
    revocations = ["revocations.json"] if (folder / "revocations.json").exists() else []
    return " ".join(["rotations.json", *revocations, *(["devices/NAME.json"] if enrolled else [])])


def _read_manifest(path: Path) -> "Manifest":
    """The manifest of a canonical file, or of the record in a run's directory."""
    from fedmini import manifest_file, operator_keys

    content = operator_keys.read_file(path)
    recorded = None
    try:
        found = json.loads(content)
        if isinstance(found, dict) and found.keys() == {"hash", "environment", "manifest"}:
            recorded = found["hash"]
            content = json.dumps(found["manifest"], sort_keys=True, separators=(",", ":")).encode()
        if isinstance(found, dict) and found.get("format") == "fedmini/signed-manifest/v1":
            raise UpdateError("it is signed already: to sign it again, give the manifest that it was made from")
        manifest = manifest_file.parse(content)
    except (UpdateError, ValueError, RecursionError) as error:
        said = str(error) if isinstance(error, UpdateError) else "it is not JSON"
        raise ConfigError(f"{path}: {said}") from None
    if recorded not in (None, manifest.hash):
        raise ConfigError(f"{path}: its hash is not that of the manifest in it: the file was changed")
    return manifest


def _describe(manifest: "Manifest") -> list[str]:
    from fedmini import floors
    from fedmini.privacy import accounting

    release = manifest.release
    lines = [
        f"Manifest {manifest.hash}",
        f"  run {manifest.run_id}: {counted(manifest.num_rounds, 'round')} of about {release.cohort_size} devices, "
        f"each releasing at most {counted(release.max_releases, 'time')}; base {manifest.base_fingerprint[:16]}...",
    ]
    for unit in release.units:
        shown = accounting.rounded_up(floors.run_epsilon(unit, manifest))
        honest = f", if {release.n_honest} of {release.min_survivors} are honest" if unit.noise == "shared" else ""
        lines.append(f"  each {unit.unit}: epsilon {shown} at delta {unit.target_delta:g}, {unit.noise} noise{honest}")
    return lines
