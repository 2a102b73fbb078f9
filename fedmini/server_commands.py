"""`fedmini server ...`: what an operator does with the folder of a server. Heavy imports happen inside commands."""

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmini.command_help import HelpedCommand
from fedmini.errors import ConfigError
from fedmini.phrases import counted, quoted

if TYPE_CHECKING:
    from fedmini.secagg.device_keys import DeviceKeys
    from fedmini.secagg.trust import Certificate
    from fedmini.server_folder import ServerFolder

server = typer.Typer(help="Set up a server, say who may log in, back it up.", rich_markup_mode=None)
devices = typer.Typer(help="The devices that may log in.", rich_markup_mode=None)
server.add_typer(devices, name="devices")

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The server's folder.")]
OperatorFolder = Annotated[
    Path | None, typer.Option("--operator", help="The operator's folder, where it is on this machine.")
]
PassphraseFile = Annotated[
    Path | None, typer.Option("--passphrase-file", help="A file whose first line is the operator key's passphrase.")
]


@server.command(cls=HelpedCommand)
def init(
    folder: Folder,
    host: Annotated[
        list[str], typer.Option("--host", help="The name or address that devices know; may be given again.")
    ],
    port: Annotated[int, typer.Option("--port", help="Where devices connect.")] = 9092,
    operator_key: Annotated[
        Path | None, typer.Option("--operator", metavar="OPERATOR.pub", help="The operator's public key.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option("--run", metavar="RUN.toml", help="Plan this run too; loads the base.")
    ] = None,
) -> None:
    """Make the folder of a new server."""
    from fedmini import config as configuration
    from fedmini import operator_keys, server_folder

    values = {"host": host[0], "other_hosts": host[1:], "port": port}
    config = configuration.parse_server_config({"server": values}, "--host and --port")
    public_key = None if operator_key is None else operator_keys.read_public_key(operator_key)
    if folder.exists():
        raise ConfigError(f"{folder} is there already: choose another folder; nothing is overwritten")
    runs = {} if run is None else _plan(run)
    made = server_folder.create(folder, config, _now(), public_key, runs)
    end = made.check_certificate(_now())
    typer.echo(f"Made {folder}: a server's folder, with a certificate for {', '.join(host)} until {end:%Y-%m-%d}.")
    typer.echo("Its .key files and loopback.token are secrets: let only the user who runs the server read it.\nNext:")
    for line in server_folder.next_steps(folder, public_key is not None, runs):
        typer.echo(line)


@server.command(cls=HelpedCommand)
def enroll(
    folder: Folder,
    device_keys: Annotated[Path, typer.Argument(metavar="DEVICE.pub", help="The device.pub that the device made.")],
    certificate: Annotated[
        Path | None, typer.Option("--certificate", metavar="CERT.json", help="From `fedmini operator certify`.")
    ] = None,
    operator: OperatorFolder = None,
    name: Annotated[str | None, typer.Option("--name", help="With --operator: what to call the device.")] = None,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Let a device log in.

    A new login key takes the old one's place.
    Without --certificate and --operator, the device is one that was enrolled before.
    """
    from fedmini import operator_keys, server_folder
    from fedmini.operator_keys import signed_files
    from fedmini.secagg import trust_text

    if (operator is None and name is not None) or (operator is not None and certificate is not None):
        raise ConfigError("give either --certificate, or --operator with --name: a certificate has its name in it")
    opened = server_folder.opened(folder)
    keys = operator_keys.read_device_keys(device_keys)
    if certificate is not None:
        found = signed_files.parse(certificate, trust_text.read_certificate)
    elif operator is not None:
        opened.roll()  # before anything is signed
        found = _certify(operator, keys, name, passphrase_file)
    else:
        found = _known_certificate(opened, keys)
    opened.enroll(keys, found)
    key = keys.device_key.hex()
    typer.echo(f"Enrolled {found.device_id}, which signs with {key}: is it the key that the device shows?")
    typer.echo(
        f"A running server lets it in within seconds. To rely on the server, it needs {server_folder.authority_of(opened)}."
    )


@devices.command("list", cls=HelpedCommand)
def list_devices(folder: Folder) -> None:
    """Show which devices may log in, and with which keys."""
    from fedmini import server_folder

    for line in server_folder.listed(server_folder.opened(folder).roll()):
        typer.echo(line)


@devices.command(cls=HelpedCommand)
def revoke(
    folder: Folder,
    name: Annotated[str, typer.Argument(metavar="NAME", help="An enrolled device, as in `devices list`.")],
    operator: OperatorFolder = None,
    revocations: Annotated[
        Path | None,
        typer.Option("--revocations", metavar="REVOCATIONS.json", help="From `fedmini operator revoke`."),
    ] = None,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Cut a device off.

    With the operator's revocations that is for good, and other devices come to know it.
    """
    from fedmini import operator_keys, server_folder
    from fedmini.operator_keys import passphrase, signed_files
    from fedmini.secagg import trust_text

    if operator is not None and revocations is not None:
        raise ConfigError("give either --operator or --revocations: one of them revokes the device")
    opened = server_folder.opened(folder)
    device_key = opened.device(name).certificate.device_key
    if operator is not None:
        with operator_keys.opened(operator, passphrase.asker(passphrase_file)) as signing:
            newest = signing.revoke(name)
        typer.echo(NOT_HERE)
    elif revocations is not None:
        newest = signed_files.parse(revocations, trust_text.read_revocations)
    else:
        opened.revoke_local(name)
        typer.echo(
            f"{name} can't log in to this server any more. Devices and other servers still believe its certificate. Next, where\n"
            f"it shall take part nowhere: `fedmini operator revoke OPERATOR {name}`, and\n"
            f"  fedmini server follow {quoted(folder)} revocations.json"
        )
        return
    if device_key not in newest.device_keys:
        raise ConfigError(f"these revocations don't have the key of {name}: revoke it with `fedmini operator revoke`")
    opened.follow((), newest)
    typer.echo(f"Revoked {name}: a running server passes revocations number {newest.sequence} on in its next round.")


@server.command(cls=HelpedCommand)
def follow(
    folder: Folder,
    signed: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help="What the operator handed out: its public key, once; later rotations, revocations, and certificates that were "
            "signed anew. Those of after a rotation belong together.",
        ),
    ],
) -> None:
    """Take what the operator handed out."""
    from fedmini import operator_keys, server_folder
    from fedmini.operator_keys import signed_files

    public_keys = [path for path in signed if signed_files.is_public_key(path)]
    others = [path for path in signed if path not in public_keys]
    opened = server_folder.opened(folder)
    found = signed_files.read_signed(others, many_certificates=True)
    for path in public_keys:
        opened.adopt(operator_keys.read_public_key(path))
    roll = opened.follow(found.rotations, found.revocations, found.certificates)
    typer.echo(f"operator     {roll.trust.operator_key.hex()}")
    number = roll.trust.revocations_sequence
    typer.echo(f"revocations  number {number}" if number else "revocations  none seen")
    for line in server_folder.listed(roll):
        typer.echo(line)


@server.command("rotate-certificate", cls=HelpedCommand)
def rotate_certificate(
    folder: Folder,
    new_ca: Annotated[
        bool, typer.Option("--new-ca", help="Begin another authority, which devices have to get.")
    ] = False,
) -> None:
    """Renew the TLS certificate, with a new key."""
    from fedmini import server_folder

    opened = server_folder.opened(folder)
    opened.rotate_certificate(_now(), new_ca)
    end = opened.check_certificate(_now())
    typer.echo(f"The certificate for {opened.config.server.host} holds until {end:%Y-%m-%d}.")
    if not new_ca:
        typer.echo("No device has to know: it is by the same authority.")
        return
    typer.echo(
        f"Next: give every device {server_folder.authority_of(opened)}, with the new authority and the one before. Devices that\n"
        "have only the old one go on until it ends. Where its key was stolen, give them the first certificate of the file\n"
        "only: who has that key can pose as this server to devices that rely on it."
    )


@server.command(cls=HelpedCommand)
def backup(
    folder: Folder,
    archive: Annotated[Path, typer.Argument(metavar="FILE.tar", help="The file to be made.")],
) -> None:
    """Copy the folder to one file.

    The server may run meanwhile.
    """
    from fedmini import server_folder

    packed = server_folder.back_up(folder, archive)
    typer.echo(f"Wrote {counted(packed.num_files, 'file')} to {archive}, {packed.size_bytes:,} bytes.")
    typer.echo(
        "It holds the server's secrets, not encrypted (tls/*.key, loopback.token): keep it as you keep the folder. Files that\n"
        "server.toml names elsewhere are not in it, and neither is the operator's key.\n"
        f"Back: fedmini server restore {quoted(archive)} NEW-DIR"
    )


@server.command(cls=HelpedCommand)
def restore(
    archive: Annotated[Path, typer.Argument(metavar="FILE.tar", help="From `fedmini server backup`.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to be made.")],
) -> None:
    """Make a server's folder from a backup."""
    from fedmini import server_folder

    restored = server_folder.restore(archive, folder)
    typer.echo(f"Made {restored.path} from {archive}.")
    typer.echo(
        "Never let two servers go on with one run. Rounds of after the backup are forgotten here, and were paid for: devices\n"
        "remember them, and refuse to give the same round twice. Revocations of after the backup are forgotten too. Next:\n"
        f"  fedmini server follow {quoted(folder)} revocations.json    (the operator's newest)"
    )


NOT_HERE = "This machine has the operator's key: it is meant to be elsewhere, where no server can be broken into."


def _now() -> datetime:
    return datetime.now(UTC)


def _plan(config: Path) -> dict[str, dict[str, bytes]]:
    """The files of a run that was planned now, by its name."""
    from fedmini import config as configuration
    from fedmini.deployment import run_files

    chosen = configuration.load_run_config(config)
    return {chosen.run.name: run_files.plan(chosen, typer.echo)}


def _certify(operator: Path, keys: "DeviceKeys", name: str | None, passphrase_file: Path | None) -> "Certificate":
    """A certificate by an operator whose folder is on this machine."""
    from fedmini import operator_keys
    from fedmini.operator_keys import passphrase

    with operator_keys.opened(operator, passphrase.asker(passphrase_file)) as signing:
        certificate = signing.certify(keys.device_key, name)
    typer.echo(NOT_HERE)
    return certificate


def _known_certificate(opened: "ServerFolder", keys: "DeviceKeys") -> "Certificate":
    for device in opened.devices().values():
        if device.certificate.device_key == keys.device_key:
            return device.certificate
    raise ConfigError("this device is not enrolled yet: add --certificate, from `fedmini operator certify`")
