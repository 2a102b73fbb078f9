"""A device's folder: enrolled with an operator once, and opened by one process at a time."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedmini.config import DeviceConfig
from fedmini.enrolment import records
from fedmini.enrolment.enrolled import Enrolment
from fedmini.enrolment.records import Believed
from fedmini.errors import ConfigError, ProtocolError, StateError
from fedmini.operator_keys import key_files
from fedmini.secagg import trust, trust_text
from fedmini.secagg.trust import Certificate, Trust


def enrol(folder: Path, certificate: Certificate, operator_key: bytes) -> None:
    """Enrol the device of a folder with an operator, once: the same again is fine, with a certificate signed anew too.

    Raises ProtocolError where the certificate is for another key or not by this operator; ConfigError where the device
    relies on another operator key; StateError where the folder is damaged.
    """
    with _locked(folder):
        records.check_own(certificate, records.read_device_key(folder))
        if records.is_enrolled(folder):
            believed = records.read_believed(folder)
            _check_operator(folder, believed, operator_key)
        else:
            believed = Believed((operator_key,), (), Trust(operator_key))
        _check_signer(certificate, operator_key)
        believed.trust.check_certificate(certificate)
        contents = {records.CERTIFICATE: trust_text.write_certificate(certificate)}
        if not records.is_enrolled(folder):
            contents |= believed.contents()
            if not (folder / records.LEDGER).exists():
                contents[records.LEDGER] = b""
            records.make_folder(folder / records.MANIFESTS)
        records.commit(folder, contents)


def new_login(folder: Path) -> None:
    """Put a fresh login key in the old one's place, enrolled or not; neither or both of its files are there.

    Raises StateError where the device's key is missing or damaged, or the folder is in use.
    """
    with _locked(folder):
        records.commit(folder, key_files.login_files(records.read_private_key(folder)))


def _check_operator(folder: Path, believed: Believed, operator_key: bytes) -> None:
    current = believed.trust.operator_key
    if operator_key != current:
        raise ConfigError(
            f"{folder} relies on the operator key {current.hex()[:16]}..., got {operator_key.hex()[:16]}...: where that one "
            "follows, give the operator's rotations to `fedmini device follow`; for another operator, make another folder "
            "with `fedmini device init` and put this one's ledger.jsonl into it"
        )


def _check_signer(certificate: Certificate, operator_key: bytes) -> None:
    try:
        trust.check_issued(operator_key, certificate)
    except ProtocolError as error:
        raise ProtocolError(
            "CERTIFICATE.json and OPERATOR.pub don't belong together: the one is not signed with the key of the other; take "
            "both from the same operator, newly, where its key was rotated"
        ) from error


@contextmanager
def opened(folder: Path, config: DeviceConfig | None = None) -> Iterator[Enrolment]:
    """An enrolled device's folder, locked against every other process, all of it verified.

    `config` stands in the place of its device.toml.

    Raises ConfigError where the device is not enrolled, or its device.toml is wrong; StateError where the folder is in
    use, or a file is missing, damaged, or not what the operator signed: it says what to do.
    """
    with _locked(folder):
        if not records.is_enrolled(folder):
            raise ConfigError(
                f"{folder} is not enrolled: `fedmini device enrol {folder} CERTIFICATE.json OPERATOR.pub`"
            )
        enrolment = Enrolment(folder, config)
        try:
            yield enrolment
        finally:
            enrolment.close()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Nobody else works in the folder meanwhile; what was begun in it before is finished."""
    if not records.is_enrolled(folder) and not (folder / records.KEY).exists():
        raise ConfigError(f"{folder} is no device's folder: make one with `fedmini device init {folder}`")
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StateError(f"another process works in {folder}: stop it, or wait until it has ended") from error
        records.finish(folder)
        yield
    finally:
        os.close(descriptor)
