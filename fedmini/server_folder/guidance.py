"""What an operator is told about a server's folder, in lines: what comes next, and who may log in."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from fedmini.phrases import counted, quoted
from fedmini.server_folder.folder import ServerFolder
from fedmini.server_folder.roll import Roll


def next_steps(folder: Path, has_operator: bool, runs: Iterable[str]) -> Iterator[str]:
    """What comes after `init`, in its order."""
    if not has_operator:
        yield "on another machine, once; then bring operator.pub here:"
        yield "  fedmini operator init OPERATOR"
        yield f"  fedmini server follow {quoted(folder)} operator.pub"
    for run in runs:
        unsigned, signed = (quoted(folder / "runs" / run / name) for name in ("manifest.json", "manifest.signed.json"))
        yield f"there, with {unsigned}; then bring the answer here, as {signed}:"
        yield "  fedmini operator sign-manifest OPERATOR manifest.json"
    yield f"for each device, which needs {quoted(folder / 'tls/ca.crt')}:"
    yield "  fedmini operator certify OPERATOR DEVICE.pub --name NAME --output CERT.json    (with the operator's key)"
    yield f"  fedmini server enroll {quoted(folder)} DEVICE.pub --certificate CERT.json"
    yield "and then:"
    yield f"  fedmini server start {quoted(folder)}"


def authority_of(opened: ServerFolder) -> str:
    """What devices check the server's certificate against."""
    authority = opened.tls.authority
    return "nothing: server.toml names a certificate of your own" if authority is None else quoted(authority)


def listed(roll: Roll) -> Iterator[str]:
    """Every device that may log in, and with which device key."""
    for name, device in roll.devices.items():
        old = "" if roll.is_current(device) else ", NOT VALID: certified by an operator key of before"
        yield f"device       {name}, signs with {device.certificate.device_key.hex()}{old}"
    yield f"             {counted(len(roll.devices), 'device')} may log in"
