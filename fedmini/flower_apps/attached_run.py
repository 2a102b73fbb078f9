"""A run served to real devices over a SuperLink that somebody else runs: everything else is as `fedmini server start` has it.

That SuperLink lets in whom its operator registered there; a run here asks those of them that are enrolled in its folder.
"""

from pathlib import Path

from flwr.serverapp import Grid

from fedmini import server_folder
from fedmini.deployment import coordinator
from fedmini.deployment.roll_call import RollCall
from fedmini.deployment.run_files import RunFiles
from fedmini.errors import StateError
from fedmini.events import Emit
from fedmini.files import replace_synced
from fedmini.flower import login_keys
from fedmini.flower.server_link import ServerLink
from fedmini.randomness import FROM_OS, Randomness
from fedmini.server_folder import ServerFolder

LOGIN_KEYS = "login-keys"


def serve(grid: Grid, folder: Path, run: str, emit: Emit, randomness: Randomness = FROM_OS) -> None:
    """Serve a run to its end, from wherever it stands. Raises a FedMiniError; what was committed is saved."""

    def connect(opened: ServerFolder, files: RunFiles) -> tuple[ServerLink, RollCall]:
        link = ServerLink.attach(grid, coordinator.max_payload_bytes(files.manifest))
        return link, RollCall(opened, None, link, files.signed, emit)

    keys = write_login_keys(server_folder.opened(folder))
    emit("devices.to_register", command=f"flwr supernode register {keys}/NAME.pub CONNECTION")
    coordinator.serve_over(connect, folder, run, emit, randomness)


def write_login_keys(folder: ServerFolder) -> Path:
    """Put each enrolled device's login key into the folder's state, as `flwr supernode register` takes it."""
    keys = folder.path / coordinator.STATE / LOGIN_KEYS
    try:
        keys.mkdir(mode=0o700, exist_ok=True)
        for name, device in folder.devices().items():
            replace_synced(keys / f"{name}.pub", login_keys.to_openssh(device.login_key_bytes), 0o600)
    except OSError as error:
        raise StateError(f"can't write {keys}: {error.strerror}; make room or mend the folder") from error
    return keys
