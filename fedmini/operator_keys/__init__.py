"""The operator's folder, kept away from the server: the signing key and all that was signed with it.

DIR/operator.key (PKCS8, 0600)    DIR/operator.pub      what devices are enrolled with
DIR/devices/NAME.json             DIR/revocations.json  DIR/rotations.json
DIR/operator.key.next             only while a rotation goes on

A private key and a passphrase never enter an error message. Every file is there whole or not at all.
"""

from fedmini.operator_keys.folder import OperatorFolder, check_folder, opened, rotate
from fedmini.operator_keys.key_files import (
    create,
    create_device,
    read_device_keys,
    read_file,
    read_public_key,
    write_file,
)

__all__ = [
    "OperatorFolder",
    "check_folder",
    "create",
    "create_device",
    "opened",
    "read_device_keys",
    "read_file",
    "read_public_key",
    "rotate",
    "write_file",
]
