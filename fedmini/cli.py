"""The command line. Heavy imports happen inside commands: `fedmini --help` answers at once."""

import os
import secrets
import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn, TypeAlias

import click
import typer

from fedmini import (
    bench_commands,
    device_commands,
    device_serving_commands,
    operator_commands,
    server_commands,
    serving_commands,
)
from fedmini.command_help import HelpedCommand
from fedmini.errors import ConfigError, FedMiniError

if TYPE_CHECKING:
    from rich.console import Console

    from fedmini.config import RunConfig
    from fedmini.planning import Base

app = typer.Typer(
    help="Fine-tune a small language model on data that never leaves the devices that hold it.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
bench_commands.add_to(app)
app.add_typer(operator_commands.operator, name="operator")
device_serving_commands.add_to(device_commands.device)
app.add_typer(device_commands.device, name="device")
serving_commands.add_to(server_commands.server)
app.add_typer(server_commands.server, name="server")

Engine: TypeAlias = Literal["own", "ray"]
ConfigFile = Annotated[Path, typer.Argument(help="The run's TOML file.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one value of the file.")
]


@app.command(cls=HelpedCommand)
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    manifest_path: Annotated[
        Path | None, typer.Option("--manifest", help="Write the manifest of a run here, to be signed; loads the base.")
    ] = None,
) -> None:
    """Say what a run will do and cost, before it does."""
    from fedmini import config as configuration
    from fedmini import device_memory, display, files, forecast, manifest_file, pace, planning
    from fedmini.model import runtime

    chosen = configuration.load_run_config(config, overrides or [])
    cache_dir = runtime.default_cache_dir()
    base = _shapes_only(chosen) if manifest_path is None else _load(chosen, cache_dir)
    run_id = f"{chosen.run.name}-{'plan' if manifest_path is None else secrets.token_hex(4)}"
    manifest = planning.make_manifest(chosen, run_id, base, cache_dir)
    known = pace.recall(cache_dir, chosen)
    seconds = pace.forecast_seconds(known.pace, manifest, chosen) if known is not None else None
    description = _description(chosen) | {"time": display.time_sentence(seconds, known)}
    if (memory := device_memory.sentence(chosen, manifest)) is not None:
        description["on a device"] = memory
    display.print_plan(_console(), manifest, forecast.forecast(manifest), description)
    if manifest_path is not None:
        try:
            files.replace_synced(manifest_path, manifest_file.canonical(manifest))
        except OSError as error:
            raise ConfigError(f"can't write {manifest_path}: {error.strerror}; choose another --manifest") from error
        typer.echo(f"wrote the manifest of {run_id} to {manifest_path}; its SHA-256 is {manifest.hash}")
        typer.echo(f"Next: fedmini operator sign-manifest DIR {shlex.quote(str(manifest_path))}")


@app.command(cls=HelpedCommand)
def simulate(
    output: Annotated[Path, typer.Option("--output", help="The run's directory.")],
    config: Annotated[Path | None, typer.Argument(help="The run's TOML file; may be left out with --resume.")] = None,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    secure: Annotated[bool, typer.Option("--secure", help="Form every sum by secure aggregation.")] = False,
    engine: Annotated[Engine, typer.Option("--engine", help="ray: train in the workers of a Ray cluster.")] = "own",
    ray_address: Annotated[
        str | None, typer.Option("--ray-address", help="A Ray cluster that is there; else one on this machine.")
    ] = None,
) -> None:
    """Run it on this machine, or on a Ray cluster."""
    if ray_address is not None and engine != "ray":
        raise ConfigError("--ray-address is for --engine ray: give both, or neither")
    if secure:
        overrides = [*(overrides or []), "simulation.secure=true"]
    if config is None and not resume:
        raise ConfigError("which run? name a configuration, or add --resume to go on with the one in --output")
    if config is None and overrides:
        raise ConfigError(
            "--set and --secure change nothing of a run that has begun: leave them away, or begin another"
        )
    try:
        _simulate(config, output, overrides or [], resume, (engine, ray_address))
    except KeyboardInterrupt:
        _end_stopped(f"stopped{_how_to_go_on(output)}")
    except BrokenPipeError:
        _discard_output()
        _fail(f"stopped, because nobody reads this command's output any more{_how_to_go_on(output)}")


def _simulate(
    config: Path | None, output: Path, overrides: list[str], resume: bool, where: tuple[Engine, str | None]
) -> None:
    from fedmini import config as configuration
    from fedmini import display, report, rundir, simulation

    console = _console()
    if config is None:
        chosen = rundir.stored_config(rundir.open_existing(output))
    else:
        chosen = configuration.load_run_config(config, overrides)
    for banner in display.warnings(chosen):
        console.print(banner, style="bold red", soft_wrap=True)
    with display.ProgressDisplay(console) as show:
        options = simulation.SimulationOptions(resume=resume, on_progress=show)
        if where[0] == "ray":
            from fedmini.flower_apps import ray_run

            result = ray_run.simulate(chosen, output, options, where[1])
        else:
            result = simulation.simulate(chosen, output=output, options=options)
    report.write_report(output)
    display.print_result(console, result)


@app.command(cls=HelpedCommand)
def report(directory: Annotated[Path, typer.Argument(help="A run's directory, finished or running.")]) -> None:
    """Plots and numbers of a finished or running run."""
    from fedmini import report

    written = report.write_report(directory)
    typer.echo(f"wrote {written}")


@app.command(cls=HelpedCommand)
def chat(
    adapter: Annotated[Path, typer.Option("--adapter", help="An adapter's folder, such as RUN/adapter.")],
    base: Annotated[str | None, typer.Option("--base", help="The base model, where not the adapter's own.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Ask one thing, print the reply, and end.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, max=5.0, help="0 always takes the likeliest word.")] = 0.7,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=4096, help="How long a reply may get.")] = 128,
) -> None:
    """Talk to a base model with an adapter, in the terminal."""
    from fedmini import chat

    settings = chat.ChatSettings(adapter, base, temperature, max_new_tokens)
    try:
        chat.run(settings, _console(), prompt)
    except (KeyboardInterrupt, EOFError):
        typer.echo()


def main() -> None:
    """Run the command line: one clear line and exit code 2 for every error of ours and for Ctrl-C, never a traceback."""
    try:
        _invoke(sys.argv[1:] or ["--help"])
        sys.stdout.flush()
    except FedMiniError as error:
        _fail(str(error))
    except click.exceptions.Exit as error:  # --help, say
        raise SystemExit(error.exit_code) from None
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx is not None else "fedmini"
        _fail(f"{error.format_message().rstrip('.')} (see `{command} --help`)")
    except KeyboardInterrupt:
        _end_stopped("stopped")
    except BrokenPipeError:  # as in `fedmini plan run.toml | head -1`
        _discard_output()
    except ModuleNotFoundError as error:
        _fail(f"the package {error.name} is not installed: install fedmini again, with its dependencies")
    except OSError as error:  # a disk that is full, a folder that went away: the message is the system's own
        what = error.filename or "a file"
        _fail(f"{what}: {error.strerror or error}; mend that and try again: what was committed before is saved")


def _invoke(arguments: list[str]) -> None:
    """Not click's own `main`: that one would answer Ctrl-C and closed pipes in its way."""
    command = typer.main.get_command(app)
    with command.make_context("fedmini", arguments) as context:
        command.invoke(context)


def _fail(message: str) -> NoReturn:
    typer.echo(f"fedmini: {message}", err=True)
    raise SystemExit(2)


def _end_stopped(message: str) -> NoReturn:
    """The end of a command that was interrupted; everything it holds open is closed by now."""
    typer.echo(f"fedmini: {message}", err=True)
    # Not SystemExit: where the interrupt went through C code first, Python dies of SIGINT at exit, without our code.
    os._exit(2)


def _how_to_go_on(output: Path) -> str:
    """What is saved of an interrupted run, and the command that goes on with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not take the answer away
    # Interrupted while packages were being imported, this process has done nothing, and can't import them again.
    if "fedmini.display" not in sys.modules or not (output / "manifest.json").exists():
        return " before the run began: nothing was spent, give the same command again"
    from fedmini import display

    again = f"{display.program()} simulate --output {shlex.quote(str(output))} --resume"
    return f"; every finished round is saved in {output}. Go on with: {again}"


def _discard_output() -> None:
    """Whatever is still to be written to a closed standard output goes nowhere, instead of failing at exit."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _console() -> "Console":
    from rich.console import Console

    class OpenConsole(Console):
        """Leaves the answer to a closed pipe to `main`."""

        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    return OpenConsole()


def _shapes_only(config: "RunConfig") -> "Base":
    from fedmini import planning
    from fedmini.model import shapes

    template = shapes.template(shapes.linear_shapes(config.base), planning.lora_shape(config))
    return planning.Base("unknown until the base is loaded", template)


def _load(config: "RunConfig", cache_dir: Path) -> "Base":
    from fedmini import planning
    from fedmini.model import loading
    from fedmini.model.lora import LoraModel

    model = LoraModel(loading.load_base(config.base, cache_dir, typer.echo), planning.lora_shape(config))
    return planning.Base(model.fingerprint, model.template)


def _description(config: "RunConfig") -> dict[str, str]:
    rounds, local = config.rounds, config.local
    return {
        "run": config.run.name,
        "base": str(config.base.name or config.base.path or config.base.hub_id),
        "data": f"{config.data.source}, {config.data.min_examples} to {config.data.max_examples_per_device} examples a device",
        "rounds": f"{rounds.num_rounds}, with {rounds.cohort_size} devices each",
        "a round": f"{local.num_steps} local step(s), each example drawn with probability {local.sampling_rate:g}",
    }
