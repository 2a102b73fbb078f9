"""The SuperLink of a deployment, as a process: the device API on the network, the whole API on loopback with a token.

`python -m fedmini.flower.gate CONFIG.json [PARENT]` runs it as a child: the configuration (it holds the token) is a file
that only its owner can read. It says {"ready": true, ...} on stdout when both ports listen, logs JSON lines on stderr,
and ends with its parent, the process PARENT.
"""

import asyncio
import contextlib
import dataclasses
import fcntl
import ipaddress
import json
import os
import resource
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fedmini import events
from fedmini.errors import ConfigError, FedMiniError, StateError

if TYPE_CHECKING:
    from fedmini.flower.long_poll import LongPoll

MIN_TOKEN_CHARACTERS = 32
LOCK_SECONDS = 10.0  # in which a process whose parent was killed has noticed, and ended


@dataclass(frozen=True, slots=True)
class GateConfig:
    """Where a gate listens and what it stands on."""

    host: str
    port: int  # the public listener: device API only; 0 takes a free port
    local_port: int  # 127.0.0.1: control, runtime and device API; 0 takes a free port
    database: Path  # SuperLink's SQLite file
    certificate: Path | None  # PEM, the chain with the leaf first; both None: no TLS, on loopback addresses only
    private_key: Path | None
    token: str  # what loopback asks for
    max_body_bytes: int = 8 * 1024 * 1024  # an object comes in chunks of 5 MiB
    max_connections: int = 2048
    address_share: float = 0.5  # of max_connections, for one address: many devices may sit behind one
    patience_s: float = 10.0  # for a handshake, and for the headers of a request

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.private_key is None):
            raise ConfigError(
                "a certificate needs its private key, and a private key its certificate: give both or none"
            )
        if self.certificate is None and not is_loopback(self.host):
            raise ConfigError(
                f"without a certificate a gate listens on loopback only, and {self.host} is not: give a certificate and key"
            )
        if len(self.token) < MIN_TOKEN_CHARACTERS or not (self.token.isascii() and self.token.isprintable()):
            raise ConfigError(f"the token must be at least {MIN_TOKEN_CHARACTERS} printable ASCII characters")
        if self.max_connections < 1 or not 0 < self.address_share <= 1 or not self.patience_s > 0:
            raise ConfigError("max_connections must be at least 1, address_share in (0, 1], and patience_s over 0")


def serve(config: GateConfig, emit: events.Emit, on_ready: Callable[[int, int], None]) -> None:
    """Serve until SIGTERM or SIGINT; `on_ready(port, local_port)` is called once both listen.

    For a process of its own, in its main thread: it takes over the signals and everything that is logged.
    Raises a StateError where another gate has the database, a ConfigError where a port or a certificate can't be used.
    """
    import uvloop

    from fedmini.flower import listener

    tls = None
    if config.certificate is not None and config.private_key is not None:
        tls = listener.tls_context(config.certificate, config.private_key)
    with locked(config.database, LOCK_SECONDS), contextlib.ExitStack() as sockets:
        public = sockets.enter_context(listener.bind(config.host, config.port))
        local = sockets.enter_context(listener.bind("127.0.0.1", config.local_port))
        uvloop.run(_run(config, (public, local, tls), emit, on_ready))  # half the time of asyncio's own loop


async def _run(
    config: GateConfig,
    bound: tuple[socket.socket, socket.socket, ssl.SSLContext | None],
    emit: events.Emit,
    on_ready: Callable[[int, int], None],
) -> None:
    from fedmini.flower import superlink
    from fedmini.flower.admission import KnownKeys, KnownOnly
    from fedmini.flower.allow_list import FleetOnly
    from fedmini.flower.listener import Limits, Listener
    from fedmini.flower.long_poll import LongPoll
    from fedmini.flower.loopback_token import TokenRequired

    superlink.capture_logs(emit)
    app = superlink.create(config.database)
    keys = KnownKeys(lambda: superlink.registered_keys(app))
    await keys.refresh()
    polls = LongPoll(app, keys.refresh)
    limits = Limits(config.max_connections, config.address_share, config.patience_s)
    public = Listener(FleetOnly(KnownOnly(polls, keys), config.max_body_bytes), bound[0], bound[2], limits)
    local = Listener(TokenRequired(polls, config.token), bound[1], None, dataclasses.replace(limits, address_share=1.0))
    ports = bound[0].getsockname()[1], bound[1].getsockname()[1]
    _stop_on_signals(polls, public, local)
    if bound[2] is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, partial(_read_anew, bound[2], config, emit))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})  # one that came while we started arrives now
    async with app.router.lifespan_context(app), asyncio.TaskGroup() as group:
        group.create_task(public.run_until_told())
        group.create_task(local.run_until_told())
        emit("gate.ready", port=ports[0], local_port=ports[1], tls=bound[2] is not None)
        on_ready(*ports)
    emit("gate.stopped", refused_connections=public.refused)


def _read_anew(tls: ssl.SSLContext, config: GateConfig, emit: events.Emit) -> None:
    """Take a certificate that was renewed for every connection from now on; one that can't be used changes nothing."""
    from fedmini.flower import listener

    assert config.certificate is not None and config.private_key is not None
    try:
        listener.load(tls, config.certificate, config.private_key)
    except ConfigError as error:
        emit("gate.certificate_refused", reason=str(error))
    else:
        emit("gate.certificate_read")


def _stop_on_signals(polls: "LongPoll", *listeners: Any) -> None:
    def stop() -> None:
        polls.bells.close()
        for each in listeners:
            each.should_exit = True

    for each in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(each, stop)


@contextlib.contextmanager
def locked(database: Path, wait_s: float = 0.0) -> Iterator[None]:
    """Hold a database for this process. The kernel lets go of it however the process ends.

    Raises StateError where another process still holds it after `wait_s`.
    """
    try:
        file = database.with_name(f"{database.name}.lock").open("a")
    except OSError as error:
        raise ConfigError(f"can't write beside the database {database}: {error.strerror}") from error
    with file:
        until = time.monotonic() + wait_s
        while not _has_locked(file):
            if time.monotonic() >= until:
                raise StateError(f"another server is running on {database}: stop it first")
            time.sleep(0.1)
        yield


def _has_locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def read_config(path: Path) -> GateConfig:
    """A gate's configuration from a JSON file, which nobody but its owner may read: it holds the token."""
    try:
        if path.stat().st_mode & 0o077:
            raise ConfigError(f"{path} holds a secret and others can read it: chmod 600 it")
        fields: dict[str, Any] = json.loads(path.read_text())
        for name in ("database", "certificate", "private_key"):
            fields[name] = None if fields[name] is None else Path(fields[name])
        return GateConfig(**fields)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path} is not a gate's configuration ({type(error).__name__})") from error


def config_json(config: GateConfig) -> str:
    """What `read_config` reads. Write it with mode 0600."""
    return json.dumps({name: _plain(value) for name, value in dataclasses.asdict(config).items()})


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def is_loopback(host: str) -> bool:
    """Whether a host is this machine itself."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def main(arguments: list[str]) -> int:
    """Run a gate from a configuration file; 2 where it can't start."""
    if len(arguments) not in (1, 2) or not all(one.isdecimal() for one in arguments[1:]):
        print("usage: python -m fedmini.flower.gate CONFIG.json [PARENT]", file=sys.stderr)
        return 2
    parent = int(arguments[1]) if len(arguments) == 2 else os.getppid()
    emit = events.to_stream(sys.stderr, "json", "gate")
    try:
        config = read_config(Path(arguments[0]))
        _prepare_process(config)
        end_with(parent)
        serve(config, emit, _say_ready)
    except FedMiniError as error:
        emit("gate.refused", reason=str(error))
        return 2
    return 0


def _say_ready(port: int, local_port: int) -> None:
    print(json.dumps({"ready": True, "port": port, "local_port": local_port}), flush=True)


def _prepare_process(config: GateConfig) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})  # before any thread; the kernel keeps one that comes
    os.umask(0o077)
    os.environ.update(quiet_environment(config.database.parent.resolve()))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * config.max_connections + 512  # two listeners, and what SQLite and Python hold
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def quiet_environment(folder: Path) -> dict[str, str]:
    """The environment under which Flower sends nothing out and writes nowhere but into `folder`."""
    return {
        "FLWR_HOME": str(folder),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }


def end_with(parent: int, interval_s: float = 0.5) -> None:
    """Ask this process to end as soon as its parent is another one than this, now or later: that one has died."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(interval_s)
        os.kill(os.getpid(), signal.SIGTERM)

    if os.getppid() != parent:  # before it does anything
        os.kill(os.getpid(), signal.SIGTERM)
    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
