"""A device without an app around it: it takes part in the background, and answers other programs where it is asked to."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import grpc

from fedmini.config import DeviceConfig
from fedmini.device import Device
from fedmini.device import settings as device_settings
from fedmini.device_service import places, quiet, service_token
from fedmini.device_service.places import Loopback, Place
from fedmini.device_service.service import MAX_CALLS, MAX_MESSAGE_BYTES, DeviceService
from fedmini.ending import Ending
from fedmini.enrolment import records
from fedmini.errors import ConfigError
from fedmini.events import Emit
from fedmini.model import runtime
from fedmini.phrases import quoted

TOKEN = "service.token"
GRACE_SECONDS = 0.5  # for calls that are being answered when it is asked to end

OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),  # else a second program could take the same port, and half of the calls
    ("grpc.compression_enabled_algorithms_bitset", 1),  # none: a compressed message could unpack to any size
)


@dataclass(frozen=True, slots=True)
class DaemonSettings:
    """Which folder, which server (None: the one in its device.toml), and where to listen (None: nowhere)."""

    folder: Path
    server: str | None = None
    server_key: Path | None = None
    place: Place | None = None
    token_file: Path | None = None  # None: service.token in the folder


def run(settings: DaemonSettings, emit: Emit, ended: Ending) -> None:
    """Take part, and answer, until `ended`. Raises ConfigError or StateError where it can't begin.

    Without a server it only answers, where it has a place to do so.
    """
    folder = settings.folder.expanduser()
    config = device_config(folder)
    quiet.leave_no_dumps(emit)
    if config.training.small_heap is None:  # nobody else's process
        runtime.keep_heap_small()
    with ExitStack() as stack:
        device = stack.enter_context(Device(folder, settings.server, settings.server_key, config=config, emit=emit))
        if settings.place is not None:
            _listen(stack, device, settings, emit)
        if settings.place is None or settings.server is not None or config.device.server is not None:
            device.start()
        emit("device.runs", examples=device.status().num_examples)
        ended.wait()
        device.stop()
    emit("device.stopped")


def device_config(folder: Path) -> DeviceConfig:
    """What a device's folder says in its device.toml. Raises ConfigError where it is no device's folder."""
    if not (folder / records.KEY).exists():
        raise ConfigError(
            f"{quoted(folder)} is no device's folder: make one with `fedmini device init {quoted(folder)}`"
        )
    return device_settings.device_config(folder, None)


def make_server(service: DeviceService) -> grpc.Server:
    """The gRPC server around a service, bound to nothing yet: at most MAX_CALLS at once, each message at most 4 MiB."""
    threads = ThreadPoolExecutor(MAX_CALLS, thread_name_prefix="fedmini-calls")
    return grpc.server(threads, handlers=(service,), options=OPTIONS, maximum_concurrent_rpcs=MAX_CALLS)


def _listen(stack: ExitStack, device: Device, settings: DaemonSettings, emit: Emit) -> None:
    assert settings.place is not None
    token = None
    if isinstance(settings.place, Loopback):
        token = service_token.read_or_make(settings.token_file or settings.folder.expanduser() / TOKEN)
    server = make_server(DeviceService(device, emit, token))
    address = stack.enter_context(places.bound(server, settings.place))
    stack.callback(lambda: server.stop(GRACE_SECONDS).wait(2 * GRACE_SECONDS))
    server.start()
    emit("service.listens", address=address)
