"""What a person sees in the terminal: live progress, the plan before a run, and what happened after it."""

import os
import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedmini.config import RunConfig
from fedmini.privacy import accounting
from fedmini.types import ADJACENCY, Manifest

if TYPE_CHECKING:  # a plan is shown without loading torch
    from fedmini.forecast import EvaluationForecast, Forecast, UnitForecast
    from fedmini.pace import KnownPace
    from fedmini.simulation import Progress, SimulationResult

NO_PRIVACY_BANNER = "NO PRIVACY: [privacy] none = true. The adapter may reveal what any one example says."
SEEDED_BANNER = "SEEDED: run.seed is set. The noise can be taken away by whoever has the seed: this protects nobody."


class ProgressDisplay:
    """A live display of a simulation: round, devices, loss, epsilon, time left; plain lines where there is no terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._is_live = console.is_terminal
        self._started = time.monotonic()
        self._progress: Progress | None = None
        self._first_work: tuple[float, float] | None = None  # when, and how many rounds were done then
        self._end: float | None = None  # when the last round will be over, as it looks now
        self._last_line = ""
        self._live = Live(get_renderable=self._render, console=console, transient=True) if self._is_live else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, progress: "Progress") -> None:
        """Show where the simulation is."""
        self._progress = progress
        self._end = self._expected_end(progress)
        if progress.note:
            self._print(progress.note)
        elif progress.stage == "round" and progress.device_index == 0:
            self._print(_round_line(progress, self._seconds_left()))

    def _print(self, line: str) -> None:
        if line != self._last_line:
            elapsed = time.monotonic() - self._started
            self._console.print(f"[{elapsed:6.1f} s] {line}", markup=False, highlight=False, soft_wrap=True)
            self._last_line = line

    def _render(self) -> Group:
        """What stands below the lines just now; drawn a few times a second, so that it is seen to be alive."""
        progress, elapsed = self._progress, f"   {duration(time.monotonic() - self._started)} so far"
        if progress is None or progress.num_rounds == 0:
            return Group(Text(f"getting ready{elapsed}"))
        head = Text(f"round {min(progress.round_num + 1, progress.num_rounds)} of {progress.num_rounds}")
        if progress.stage == "evaluation":
            head = Text(f"after round {progress.round_num} of {progress.num_rounds}   measuring the loss")
        elif progress.num_devices:
            head.append(f"   device {progress.device_index} of {progress.num_devices}")
        head.append(elapsed)
        bar = ProgressBar(total=progress.num_rounds, completed=_rounds_done(progress), width=60)
        numbers = Text(_numbers(progress, self._seconds_left(), with_old_loss=True))
        return Group(head, numbers, bar)  # a bar does not end its line

    def _expected_end(self, progress: "Progress") -> float | None:
        if progress.stage != "round" or progress.num_rounds == 0:
            return self._end
        done, now = _rounds_done(progress), time.monotonic()
        if self._first_work is None:
            self._first_work = (now, done)
        since, before = self._first_work
        if done <= before:
            return None
        return now + (now - since) / (done - before) * (progress.num_rounds - done)

    def _seconds_left(self) -> float | None:
        return None if self._end is None else max(0.0, self._end - time.monotonic())


def _rounds_done(progress: "Progress") -> float:
    part = progress.device_index / progress.num_devices if progress.num_devices else 0.0
    return progress.round_num + part


def _numbers(progress: "Progress", seconds_left: float | None, with_old_loss: bool = False) -> str:
    parts = []
    is_fresh = progress.loss_round == progress.round_num
    if progress.loss is not None and (is_fresh or with_old_loss):
        when = "" if is_fresh else f" (round {progress.loss_round})"
        parts.append(f"loss on unseen people {progress.loss:.3f} nats/token{when}")
    for unit, epsilon in (progress.epsilon or {}).items():
        parts.append(f"epsilon {accounting.rounded_up(epsilon, 2)} per {unit}")
    if seconds_left is not None and progress.round_num < progress.num_rounds:
        parts.append(f"{duration(seconds_left)} left")
    return "   ".join(parts)


def _round_line(progress: "Progress", seconds_left: float | None) -> str:
    numbers = _numbers(progress, seconds_left)
    if progress.round_num == 0:
        return f"before training:   {numbers}"
    return f"round {progress.round_num} of {progress.num_rounds}:   {progress.num_devices} devices   {numbers}"


def duration(seconds: float) -> str:
    """A time as a person says it: seconds, then minutes, then hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def time_sentence(seconds: float | None, known: "KnownPace | None" = None) -> str:
    """How long a run will take here, as far as that is known, and how the run went that this is known from."""
    if seconds is None:
        return "not known on this machine before a first run with these settings"
    text = f"about {duration(seconds)} of training and evaluation, going by the last run with these settings here"
    if known is None:
        return text
    processes = "1 process" if known.workers == 1 else f"{known.workers} processes"
    devices = "1 device" if known.devices_per_batch == 1 else f"{known.devices_per_batch} devices"
    return f"{text} ({processes}, {devices} at a time in each)"


def _bytes(size: float) -> str:
    return f"{size / 1e6:.2f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def print_result(console: Console, result: "SimulationResult") -> None:
    """What happened, in plain words, and what to do next."""

    def line(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    change = result.loss_after - result.loss_before
    line("")
    line(
        f"Loss on {result.evaluated_on}: {result.loss_before:.3f} before, {result.loss_after:.3f} after "
        f"({change:+.3f} nats a token)."
    )
    for sentence in privacy_sentences(result.privacy):
        line(sentence)
    last = result.history[-1]
    num_rounds = int(last["round"])
    upload, download = int(last["upload_bytes_per_device"]), int(last["download_bytes_per_device"])
    line(
        f"Each device sent {_bytes(upload)} a round and received {_bytes(download)}: "
        f"at most {_bytes(upload * num_rounds)} and {_bytes(download * num_rounds)} in {num_rounds} rounds."
    )
    line(f"Adapter: {result.path / 'adapter'}")
    line(f"Report:  {result.path / 'report.html'}   (privacy statement: {result.path / 'privacy.json'})")
    line(f"Talk to it:  {program()} chat --adapter {shlex.quote(str(result.path / 'adapter'))}")


def warnings(config: RunConfig) -> list[str]:
    """What has to be said loudly before a run begins."""
    found = [NO_PRIVACY_BANNER] if config.privacy.none else []
    return found if config.run.seed is None else [*found, SEEDED_BANNER]


def privacy_sentences(privacy: Mapping[str, Any]) -> list[str]:
    """What was promised, one sentence a guarantee; loud where nothing was."""
    if not privacy["guarantees"]:
        return [NO_PRIVACY_BANNER]
    sentences = [SEEDED_BANNER] if privacy["noise_was_seeded"] else []
    for found in privacy["guarantees"]:
        sentences.append(
            f"Privacy: epsilon {accounting.rounded_up(found['epsilon'], 2)} at delta {found['delta']:g} "
            f"for {found['adjacency']}; holds against {found['holds_against']}."
        )
        if "epsilon_of_a_lone_honest_device" in found:
            sentences.append(
                f"         It rests on {found['n_honest']} honest devices in every round; if one alone were honest, "
                f"its epsilon would be {accounting.rounded_up(found['epsilon_of_a_lone_honest_device'], 1)}."
            )
    return sentences


def print_plan(console: Console, manifest: Manifest, forecast: "Forecast", describe: Mapping[str, str]) -> None:
    """What a run will do and cost, before it does."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in describe.items():
        table.add_row(name, value)
    table.add_row(
        "trained",
        f"{manifest.num_trained:,} coordinates "
        f"(rank {manifest.lora.lora_rank}, {manifest.lora.trained}, {', '.join(manifest.lora.target_modules)})",
    )
    table.add_row(
        "a device",
        f"sends {_bytes(forecast.upload_bytes_per_device)} and receives {_bytes(forecast.download_bytes_per_device)} "
        f"a round ({manifest.release.modulus_bits}-bit integers)",
    )
    for unit in forecast.units:
        _add_unit(table, unit)
    if forecast.evaluation is not None:
        _add_evaluation(table, manifest, forecast.evaluation)
    if not forecast.units:
        table.add_row("privacy", NO_PRIVACY_BANNER)
    if forecast.noise_to_signal is not None:
        table.add_row("noise", _noise_sentence(manifest, forecast))
    console.print(table)


def _add_unit(table: Table, found: "UnitForecast") -> None:
    plan = found.plan
    table.add_row(
        f"per {plan.unit}",
        f"epsilon {accounting.rounded_up(found.epsilon)} at delta {plan.target_delta:g} after {found.num_releases} releases; "
        f"noise multiplier {plan.noise_multiplier:.4f} (effective {plan.z_eff:.4f}), clip norm {plan.clip_norm:g}, "
        f"noise {plan.noise}",
    )
    table.add_row("", f"protects {ADJACENCY[plan.unit]}")
    if found.epsilon_lone is not None:
        table.add_row(
            "",
            f"rests on {plan.num_shares} honest devices in every round; a lone honest device would have "
            f"{accounting.rounded_up(found.epsilon_lone, 1)}",
        )


def _add_evaluation(table: Table, manifest: Manifest, found: "EvaluationForecast") -> None:
    plan = manifest.evaluation
    assert plan is not None
    table.add_row(
        "on devices",
        f"the loss on the {plan.fraction:.0%} that each holds back, {found.num_evaluations} times, "
        f"each known to {found.error:.2f} nats a token (one standard deviation of its noise)",
    )
    for unit in found.units:
        together = accounting.rounded_up(found.epsilon_together[unit.plan.unit])
        table.add_row(
            "",
            f"costs epsilon {accounting.rounded_up(unit.epsilon)} per {unit.plan.unit} by itself; {together} with the training",
        )


def _noise_sentence(manifest: Manifest, forecast: "Forecast") -> str:
    ratio = forecast.noise_to_signal
    assert ratio is not None
    text = f"{ratio:.2f} times the largest signal one round's mean can hold"
    if forecast.cohort_needed is None:
        return text
    text += f": the noise will drown it. A cohort of {forecast.cohort_needed:,} devices"
    if forecast.rank_needed is not None:
        text += f", or lora_rank = {forecast.rank_needed},"
    return (
        f"{text} would bring it down to 3 (now {manifest.release.cohort_size} devices, rank {manifest.lora.lora_rank})"
    )


def program() -> str:
    """How this command line was called, so that a printed command can be pasted."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and spec.name == "fedmini.__main__":
        return f"{_command(Path(sys.executable))} -m fedmini"
    return _command(Path(sys.argv[0]))


def _command(program_file: Path) -> str:
    """The shortest word that a shell in this folder runs that file by. A link is not followed: it can be an environment."""
    path = os.path.abspath(program_file)
    found = shutil.which(program_file.name)
    if found is not None and os.path.abspath(found) == path:
        return shlex.quote(program_file.name)
    relative = os.path.relpath(path)
    if relative.startswith(os.pardir):
        return shlex.quote(path)
    return shlex.quote(relative if os.sep in relative else os.path.join(os.curdir, relative))
