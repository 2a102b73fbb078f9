"""`fedmini server start`, `status` and `stop`: the running server. Heavy imports happen inside commands."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fedmini import events
from fedmini.command_help import HelpedCommand
from fedmini.errors import ConfigError, FedMiniError, StateError
from fedmini.phrases import counted, quoted

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The server's folder.")]


def start(
    folder: Folder,
    run: Annotated[
        Path | None, typer.Argument(metavar="[RUN.toml]", help="The run; may be left out where DIR has only one.")
    ] = None,
    log_format: Annotated[
        str | None, typer.Option("--log-format", help="text or json: one line for each event, on standard error.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="No TLS; on a loopback address only.")] = False,
) -> None:
    """Serve a run, in the foreground.

    Whatever was interrupted goes on.
    """
    from fedmini import server_folder
    from fedmini.deployment import supervisor

    if log_format not in (None, "text", "json"):
        raise ConfigError(f"--log-format: expected text or json, got {log_format!r}")
    chosen: Literal["text", "json"] | None = log_format  # type: ignore[assignment]
    with _refusing_in(chosen):
        opened = server_folder.opened(folder)
    with _refusing_in(chosen or opened.config.server.log_format):
        name = _planned(opened.path, run)
        code = supervisor.start(folder, name, chosen, insecure=insecure)
    raise typer.Exit(code)


def status(folder: Folder) -> None:
    """How the server and its run stand."""
    from fedmini import server_folder
    from fedmini.deployment import supervisor
    from fedmini.deployment.status import StatusFile

    server_folder.opened(folder)
    pid = supervisor.running_pid(folder)
    found = StatusFile(folder / "state").last()
    if found is None and pid is None:
        raise StateError(f"no server has ever run in {folder}")
    typer.echo(f"server       {f'runs as process {pid}' if pid else 'does not run'}")
    if found is None:
        typer.echo("now          starting: it has said nothing yet")
        return
    for line in _standing(found, is_running=pid is not None):
        typer.echo(line)


def stop(folder: Folder) -> None:
    """End the running server.

    What it has committed stays, and `start` goes on.
    """
    from fedmini import server_folder
    from fedmini.deployment import supervisor

    server_folder.opened(folder)
    if not supervisor.stop(folder):
        raise ConfigError(f"no server runs in {folder}")
    typer.echo(f"Stopped. Go on with: fedmini server start {quoted(folder)}")


def add_to(server: typer.Typer) -> None:
    """Add these commands to `fedmini server`."""
    for command in (start, status, stop):
        server.command(cls=HelpedCommand)(command)


@contextmanager
def _refusing_in(log_format: str | None) -> Iterator[None]:
    """Where the log is JSON, why a server can't begin or go on is its last line, and the exit code 2."""
    try:
        yield
    except (FedMiniError, OSError) as error:
        if log_format != "json" or isinstance(error, BrokenPipeError):
            raise
        reason = (
            str(error)
            if isinstance(error, FedMiniError)
            else f"{error.filename or 'a file'}: {error.strerror or error}"
        )
        events.to_stream(sys.stderr, "json", "server")("server.refused", reason=reason)
        raise typer.Exit(2) from error


def _planned(folder: Path, run: Path | None) -> str:
    """The name of the run that is meant, planned here; one that was not is planned now, and has to be signed first."""
    from fedmini import config as configuration
    from fedmini.deployment import run_files

    if run is None:
        found = sorted(path.parent.name for path in (folder / "runs").glob("*/config.toml"))
        if len(found) != 1:
            which = f"{counted(len(found), 'run')} are there: {', '.join(found)}" if found else "there is none yet"
            raise ConfigError(f"which run? name its RUN.toml; {which}")
        return found[0]
    chosen = configuration.load_run_config(run)
    place = folder / "runs" / chosen.run.name
    if (place / "config.toml").exists():
        run_files.check_asked(place, chosen)
    else:
        run_files.put(place, run_files.plan(chosen, typer.echo))
        typer.echo(f"Planned {chosen.run.name} in {place}.")
    return chosen.run.name


def _standing(found: dict[str, Any], *, is_running: bool) -> Iterator[str]:
    from fedmini.privacy import accounting

    ago = max(0, round(time.time() - found["time"]))
    yield f"run          {found['run']}: {found['round']} of {counted(found['num_rounds'], 'round')} committed"
    said = found["phase"] if is_running or found["phase"] == "finished" else f"{found['phase']} when it ended"
    yield f"now          {said}, {ago} s ago; {counted(len(found['ready']), 'device')} ready"
    for unit, epsilon in found["epsilon"].items():
        yield f"spent        {unit} epsilon {accounting.rounded_up(epsilon)}"
    if found["eval_loss"] is not None:
        yield f"loss         {found['eval_loss']:.4f} nats a token, on the public file"
    for name, why in sorted(found["waiting_for"].items()):
        yield f"waits for    {name}: {why}"
