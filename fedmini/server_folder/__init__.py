"""The folder of who runs a server: its settings, its certificate, and the devices that may log in. No operator's key.

DIR/server.toml        where it listens, what it takes, how long it waits
DIR/tls/               its certificate, and the authority that devices rely on (certificates.py)
DIR/operator.pub       the operator's public key that it began with; DIR/rotations.json leads on to the one of now
DIR/revocations.json   the newest list seen
DIR/devices/NAME.json  the certificate and the login key of an enrolled device
DIR/loopback.token     what a process on this machine shows to be let in (0600)
DIR/runs/NAME/...      a run each          DIR/state/...   what connects devices now, and has cut off

Every file is there whole or not at all. A running server reads it all without a lock (roll.py).
"""

from fedmini.server_folder.archive import back_up, restore
from fedmini.server_folder.certificates import TlsFiles
from fedmini.server_folder.folder import ServerFolder, create, opened
from fedmini.server_folder.guidance import authority_of, listed, next_steps
from fedmini.server_folder.roll import EnrolledDevice, Roll

__all__ = [
    "EnrolledDevice",
    "Roll",
    "ServerFolder",
    "TlsFiles",
    "authority_of",
    "back_up",
    "create",
    "listed",
    "next_steps",
    "opened",
    "restore",
]
