"""`fedmini device serve`, `run` and `add`: a device without an app around it. Heavy imports happen inside commands."""

import gc
import signal
import sys
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fedmini import events
from fedmini.command_help import HelpedCommand
from fedmini.ending import Ending
from fedmini.errors import ConfigError
from fedmini.phrases import counted, quoted

if TYPE_CHECKING:
    from fedmini.device_service.daemon import DaemonSettings

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The device's own folder.")]
Server = Annotated[
    str | None, typer.Option("--server", metavar="URL", help="https://HOST:PORT, where device.toml names none.")
]
ServerKey = Annotated[
    Path | None,
    typer.Option("--server-key", metavar="FILE", help="The certificate that the server's is checked against."),
]
LogFormat = Annotated[str, typer.Option("--log-format", help="text or json: one line an event, on standard error.")]


def serve(
    folder: Folder,
    socket: Annotated[
        Path | None, typer.Option("--socket", metavar="PATH", help="A unix socket, for this user only.")
    ] = None,
    listen: Annotated[
        str | None, typer.Option("--listen", metavar="HOST:PORT", help="Or a loopback address, with a token.")
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option("--token-file", metavar="FILE", help="Its token, made where missing (DIR/service.token)."),
    ] = None,
    server: Server = None,
    server_key: ServerKey = None,
    log_format: LogFormat = "text",
) -> None:
    """Run the device, and let other programs on this machine use it.

    They speak gRPC, as clients/proto/device.proto says.
    """
    if (socket is None) == (listen is None):
        raise ConfigError("where shall it listen? give --socket PATH or --listen 127.0.0.1:PORT, one of them")
    if socket is not None and token_file is not None:
        raise ConfigError("--token-file goes with --listen: a socket is kept from others by its mode")
    ended = _ended_by_signals()
    from fedmini.device_service import quiet

    quiet.silence_grpc()
    from fedmini.device_service import places
    from fedmini.device_service.daemon import DaemonSettings

    place = places.UnixSocket(socket) if socket is not None else places.parse_loopback(listen or "")
    _run(DaemonSettings(folder, server, server_key, place, token_file), log_format, ended)


def run(folder: Folder, server: Server = None, server_key: ServerKey = None, log_format: LogFormat = "text") -> None:
    """Run the device, and listen to nobody.

    What it learns from is put in with `fedmini device add`.
    """
    ended = _ended_by_signals()
    from fedmini.device_service import quiet

    quiet.silence_grpc()
    from fedmini.device_service.daemon import DaemonSettings

    _run(DaemonSettings(folder, server, server_key), log_format, ended)


def add(
    folder: Folder,
    source: Annotated[
        Path, typer.Argument(metavar="FILE.jsonl", help='{"prompt", "response"} or {"text"} a line; .gz and .zst too.')
    ],
) -> None:
    """Put examples from a file into the device's store.

    All of them, or none where a line is wrong. The device may be running.
    """
    from fedmini.data.jsonl import read_jsonl
    from fedmini.device_service.daemon import device_config
    from fedmini.store import ExampleStore, StoredExample

    limits = device_config(folder).store
    kept: deque[StoredExample] = deque(maxlen=limits.max_examples)  # more than that would be gone at once
    num_read = 0
    for record in read_jsonl(source, needs_client=False):
        kept.append(StoredExample(record.example.response, record.example.prompt))
        num_read += 1
    if not num_read:
        raise ConfigError(f"{source} holds no example")
    with ExampleStore.open(folder / "examples", limits) as store:
        store.add_many(kept)
        typer.echo(f"Added {counted(num_read, 'example')} to {quoted(folder)}: it keeps {store.num_examples}.")


def add_to(device: typer.Typer) -> None:
    """Add these commands to `fedmini device`."""
    for command in (serve, run, add):
        device.command(cls=HelpedCommand)(command)


def _ended_by_signals() -> Ending:
    """Asked for by SIGTERM and Ctrl-C, from now on; a second one ends the process at once."""
    ended = Ending()
    ended.listen(signal.SIGTERM, signal.SIGINT)
    return ended


def _run(settings: "DaemonSettings", log_format: str, ended: Ending) -> None:
    from fedmini.device_service import daemon

    if log_format not in ("text", "json"):
        raise ConfigError(f"--log-format: expected text or json, got {log_format!r}")
    chosen: Literal["text", "json"] = log_format  # type: ignore[assignment]
    daemon.run(settings, events.to_stream(sys.stderr, chosen, "device"), ended)
    # All is closed. Python's last collection would take seconds over torch's objects, for memory that goes anyway.
    gc.freeze()
