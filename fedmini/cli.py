"""The command line. Heavy imports happen inside commands: `fedmini --help` answers at once."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import click
import typer

from fedmini.errors import ConfigError, FedMiniError

if TYPE_CHECKING:
    from rich.console import Console

    from fedmini.config import RunConfig

app = typer.Typer(
    help="Fine-tune a small language model on data that never leaves the devices that hold it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

ConfigFile = Annotated[Path, typer.Argument(help="The run's TOML file.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one value of the file.")
]


@app.command()
def plan(config: ConfigFile, overrides: Overrides = None) -> None:
    """Say what a run will do and cost, before it does."""
    from fedmini import config as configuration
    from fedmini import display, forecast, planning
    from fedmini.model import runtime, shapes

    chosen = configuration.load_run_config(config, overrides or [])
    template = shapes.template(shapes.linear_shapes(chosen.base), planning.lora_shape(chosen))
    base = planning.Base("unknown until the base is loaded", template)
    manifest = planning.make_manifest(chosen, f"{chosen.run.name}-plan", base, runtime.default_cache_dir())
    display.print_plan(_console(), manifest, forecast.forecast(manifest, chosen), _description(chosen))


@app.command()
def simulate(
    output: Annotated[Path, typer.Option("--output", help="The run's directory.")],
    config: Annotated[Path | None, typer.Argument(help="The run's TOML file; may be left out with --resume.")] = None,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
) -> None:
    """Run it on this machine: every device in this process."""
    from fedmini import config as configuration
    from fedmini import display, report, rundir, simulation

    console = _console()
    if config is None and not resume:
        raise ConfigError("which run? name a configuration, or add --resume to go on with the one in --output")
    if config is None:
        chosen = rundir.stored_config(rundir.open_existing(output))
    else:
        chosen = configuration.load_run_config(config, overrides or [])
    for banner in display.warnings(chosen):
        console.print(banner, style="bold red")
    try:
        with display.ProgressDisplay(console) as show:
            options = simulation.SimulationOptions(resume=resume, on_progress=show)
            result = simulation.simulate(chosen, output=output, options=options)
        report.write_report(output)
    except KeyboardInterrupt:
        again = f"{display.program()} simulate --output {shlex.quote(str(output))} --resume"
        _fail(f"stopped; every finished round is saved in {output}. Go on with: {again}")
    display.print_result(console, result)


@app.command()
def report(directory: Annotated[Path, typer.Argument(help="A run's directory, finished or running.")]) -> None:
    """Plots and numbers of a finished or running run."""
    from fedmini import report

    written = report.write_report(directory)
    typer.echo(f"wrote {written}")


@app.command()
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
    """Run the command line: one clear line and exit code 2 for every error of ours, never a traceback."""
    try:
        app(standalone_mode=False)
    except FedMiniError as error:
        _fail(str(error))
    except click.exceptions.Abort:
        _fail("stopped")
    except click.ClickException as error:
        error.show()
        raise SystemExit(2) from None
    except BrokenPipeError:
        raise SystemExit(0) from None
    except OSError as error:  # a disk that is full, a folder that went away: the message is the system's own
        _fail(f"{error.filename or 'a file'}: {error.strerror or error}; what was committed before is saved")


def _fail(message: str) -> NoReturn:
    typer.echo(f"fedmini: {message}", err=True)
    raise SystemExit(2)


def _console() -> "Console":
    from rich.console import Console

    return Console()


def _description(config: "RunConfig") -> dict[str, str]:
    rounds, local = config.rounds, config.local
    return {
        "run": config.run.name,
        "base": str(config.base.name or config.base.path or config.base.hub_id),
        "data": f"{config.data.source}, {config.data.min_examples} to {config.data.max_examples_per_device} examples a device",
        "rounds": f"{rounds.num_rounds}, with {rounds.cohort_size} devices each",
        "a round": f"{local.num_steps} local step(s), each example drawn with probability {local.sampling_rate:g}",
    }
