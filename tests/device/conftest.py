"""One tiny base, operator and certificate for all tests of a device; a folder, a server and a device for each."""

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from fedmini.device import Device
from fedmini.types import Manifest
from tests.device import certificates, world
from tests.device.hostile_server import HostileServer
from tests.device.world import Heard, Owned, Turning


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the tiny base lies. What is made of it is cached beside it."""
    folder = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        world.tiny_base(folder)
        yield folder


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[Path, Path]]:
    return certificates.authority(tmp_path_factory.mktemp("tls") / "good")


@pytest.fixture
def server(tmp_path: Path, authority: tuple[Path, tuple[Path, Path]]) -> Iterator[HostileServer]:
    made = HostileServer(tmp_path, authority[1])
    yield made
    made.close()


THREADS = {"fedmini-device", "fedmini-conditions", "fedmini-heartbeat", "fedmini-usage", "fedmini-keyring"}


class Devices:
    """Opens devices, and closes them in the end: then the process is as it was before."""

    def __init__(self, folder: Path, base: Path, server: HostileServer | None, ca: Path, held: ExitStack) -> None:
        self.folder, self.base, self.server, self.ca, self._held = folder, base, server, ca, held

    def __call__(
        self,
        *accepted: Manifest,
        name: str = "anna",
        is_enrolled: bool = True,
        examples: list[tuple[str | None, str]] = world.EXAMPLES,
        url: str | None = None,
        ca: Path | None = None,
        heard: Heard | None = None,
        **sections: Any,
    ) -> Owned:
        """A device that has agreed to these runs in advance. The same name again is the same folder."""
        folder, conditions = self.folder / name, Turning()
        sections["consent"] = {"manifests": [manifest.hash for manifest in accepted]}
        heard = heard if heard is not None else Heard()
        device = self._held.enter_context(
            Device(
                folder,
                url or (self.server.url if self.server is not None else None),
                ca or self.ca,
                conditions=conditions,
                config=world.settings(self.base, **sections),
                emit=heard,
                find_keyring=lambda: None,
            )
        )
        if is_enrolled and device.status().name is None:
            world.enrol(device, folder, name)
        if examples:
            device.add_examples(examples)
        return Owned(device, conditions, heard, folder)


@pytest.fixture
def devices(
    tmp_path: Path, base: Path, server: HostileServer, authority: tuple[Path, tuple[Path, Path]]
) -> Iterator[Devices]:
    before = process_state()
    with ExitStack() as held:
        yield Devices(tmp_path, base, server, authority[0], held)
    world.wait_until(lambda: process_state() == before, f"the process to be as before: {process_state()}", 20)


def process_state() -> tuple[list[str], list[object]]:
    """What a device could have left behind: threads, and handlers of signals."""
    threads = sorted(one.name for one in threading.enumerate() if one.name in THREADS)
    return threads, [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)]
