"""The four plots of a report: what each shows, and what to look for in it."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from fedmini.forecast import NOISE_TO_SIGNAL_LIMIT
from fedmini.report import pictures, wording
from fedmini.report.facts import RunFacts, is_finite

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, slots=True)
class Plot:
    """One plot, drawn. `is_empty`: there was nothing to show, and the picture and the caption say why."""

    name: str
    title: str
    caption: str
    svg: str
    png: bytes
    is_empty: bool


@dataclass(frozen=True, slots=True)
class _Sketch:
    name: str
    title: str
    caption: str
    draw: Callable[["Axes", RunFacts], None]
    missing: str | None = None  # why there is nothing to draw


def draw(facts: RunFacts) -> tuple[Plot, ...]:
    """The plots of a run, with the same bytes for the same facts."""
    sketches = (_loss(facts), _epsilon(facts), _noise(facts), _bytes(facts))
    with pictures.own_style():
        return tuple(_render(sketch, facts) for sketch in sketches)


def _render(sketch: _Sketch, facts: RunFacts) -> Plot:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.6, 3.7), layout="constrained")
    axes = figure.add_subplot()
    if sketch.missing is None:
        axes.set_xlabel("round")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        sketch.draw(axes, facts)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, borderaxespad=0.3, handlelength=2.6)
    else:
        axes.set_axis_off()
        axes.text(0.5, 0.5, sketch.missing, ha="center", va="center", wrap=True, transform=axes.transAxes)
    return Plot(
        name=sketch.name,
        title=sketch.title,
        caption=sketch.missing or sketch.caption,
        svg=pictures.svg(figure, sketch.name, sketch.title),
        png=pictures.png(figure),
        is_empty=sketch.missing is not None,
    )


def _loss(facts: RunFacts) -> _Sketch:
    caption = (
        f"Loss on {wording.measured_on(facts)}, in nats a token. Look for a line that falls: 0.1 less means that the "
        "right next token was given about a tenth more probability. A line that rises says that the noise, or the "
        "learning rate, is too large."
    )
    if facts.series("train_loss"):
        caption += (
            " The squares are what the devices of a round report of their own examples before its step, noised like "
            "all the rest; a bar is one standard deviation of that noise, and may leave the picture."
        )
    if facts.series("device_loss"):
        caption += (
            " The triangles are what devices measured on examples that they never train on: a release of its own, with its "
            "own noise."
        )
    missing = (
        None if any(map(facts.series, ("eval_loss", "train_loss", "device_loss"))) else "No loss has been measured yet."
    )
    return _Sketch("loss", "Loss by round", caption, _draw_loss, missing)


def _draw_loss(axes: "Axes", facts: RunFacts) -> None:
    evaluated = facts.series("eval_loss")
    trained = [line for line in facts.rounds if is_finite(line.get("train_loss"))]
    if trained:
        errors = [line["train_loss_error"] if is_finite(line.get("train_loss_error")) else 0.0 for line in trained]
        axes.errorbar(
            [line["round"] for line in trained],
            [line["train_loss"] for line in trained],
            yerr=errors,
            label="training, with its noise",
            capsize=3,
            elinewidth=1,
            **pictures.training_line(len(trained)),
        )
    measured = [line for line in facts.history if is_finite(line.get("device_loss"))]
    if measured:
        axes.errorbar(
            [line["round"] for line in measured],
            [line["device_loss"] for line in measured],
            yerr=[line["device_loss_error"] for line in measured],
            label="held back on devices, with its noise",
            capsize=3,
            elinewidth=1,
            linestyle="none",
            marker="^",
            color="0.45",
        )
    if evaluated:
        axes.plot(
            *zip(*evaluated, strict=True),
            label=wording.measured_on(facts),
            zorder=3,
            **pictures.line(pictures.SOLID, len(evaluated)),
        )
        _label_point(axes, evaluated[0], above=True)
        if len(evaluated) > 1:
            _label_point(axes, evaluated[-1], above=evaluated[-1][1] > evaluated[-2][1])
        axes.set_ylim(*_loss_limits([loss for _, loss in evaluated], [line["train_loss"] for line in trained]))
    axes.set_ylabel("loss (nats a token)")


def _loss_limits(evaluated: list[float], trained: list[float]) -> tuple[float, float]:
    """Room for the loss that counts; the noised one may widen it, but not make it a flat line."""
    low, high = min(evaluated), max(evaluated)
    span = max(high - low, 0.1)
    low, high = max(min([low, *trained]), low - span), min(max([high, *trained]), high + span)
    return low - 0.25 * span, high + 0.25 * span


def _label_point(axes: "Axes", point: tuple[int, float], above: bool) -> None:
    """The value beside a point, inwards, on the side where the line does not run."""
    side = "left" if point[0] == 0 else "right"
    offset = (4 if side == "left" else 2, 8 if above else -15)
    axes.annotate(f"{point[1]:.3f}", point, offset, textcoords="offset points", ha=side, fontweight="bold", zorder=4)


def _epsilon(facts: RunFacts) -> _Sketch:
    caption = (
        "Privacy spent so far by the device that spent most. Look for the line to end at or below its budget: a run "
        "stops before the round that would pass it. The first round costs most, later ones less each."
    )
    if len(facts.guarantees) > 1:
        caption += " The two lines are separate guarantees, for different units; they are never added up."
    if facts.is_seeded:
        caption = f"Nominal only: the noise was seeded and protects nobody. {caption}"
    missing = "No epsilon to show: this run has no privacy." if not facts.is_private else None
    return _Sketch("epsilon", "Epsilon spent", caption, _draw_epsilon, missing or _before_any_round(facts))


def _draw_epsilon(axes: "Axes", facts: RunFacts) -> None:
    for guarantee, line in zip(facts.guarantees, (pictures.SOLID, pictures.DASHED), strict=False):
        spent = [
            (entry["round"], entry["epsilon"][guarantee.unit])
            for entry in facts.history
            if is_finite(entry.get("epsilon", {}).get(guarantee.unit))
        ]
        if spent:
            axes.plot(
                *zip(*spent, strict=True),
                label=f"per {guarantee.unit}",
                clip_on=False,
                zorder=3,
                **pictures.line(line, len(spent)),
            )
        if guarantee.budget is not None:
            style: Any = (0, (6, 3)) if line is pictures.SOLID else ":"
            label = f"budget per {guarantee.unit}: {guarantee.budget:g}"
            axes.axhline(guarantee.budget, color=pictures.INK, linestyle=style, linewidth=1.3, label=label)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("epsilon (no unit)")


def _noise(facts: RunFacts) -> _Sketch:
    caption = (
        "Length of the noise in a round's mean against the length of what is left of it as signal. Look for points "
        "below the line at 3: above it a single round says little, and many are needed to learn anything. More "
        "devices, or a lower LoRA rank, bring the points down."
    )
    ratios = dict(facts.series("noise_to_signal"))
    absent = [str(line["round"]) for line in facts.rounds if line["round"] not in ratios]
    if absent and ratios:
        where = f"round {', '.join(absent)}" if len(absent) <= 8 else f"{len(absent)} of {len(facts.rounds)} rounds"
        caption += f" No signal could be told from the noise in {where}."
    missing = None
    if not facts.is_private:
        missing = "No noise to show: this run has no privacy."
    elif facts.rounds and not ratios:
        missing = "In no round could the signal be told from the noise, or the noise has no fixed size (a local Adam)."
    return _Sketch("noise", "Noise against signal", caption, _draw_noise, missing or _before_any_round(facts))


def _draw_noise(axes: "Axes", facts: RunFacts) -> None:
    ratios = facts.series("noise_to_signal")
    axes.plot(
        *zip(*ratios, strict=True), label="noise / signal", zorder=3, **pictures.line(pictures.SOLID, len(ratios))
    )
    label = f"{NOISE_TO_SIGNAL_LIMIT:g}: above it, noise drowns the signal"
    axes.axhline(NOISE_TO_SIGNAL_LIMIT, color=pictures.INK, linestyle=(0, (6, 3)), linewidth=1.3, label=label)
    values = [ratio for _, ratio in ratios]
    if max(values) > 10 * NOISE_TO_SIGNAL_LIMIT and min(values) > 0:
        pictures.scale_by_powers(axes)
    else:
        axes.set_ylim(0, 1.15 * max(*values, NOISE_TO_SIGNAL_LIMIT))
    axes.set_ylabel("noise / signal (ratio)")


def _bytes(facts: RunFacts) -> _Sketch:
    caption = (
        "What a device that took part in every round has sent and received, in all. Look at the right end: it is the "
        "most that the run's updates cost one person's data plan. The base model, which is installed once, and the "
        "protocol's own messages are not counted."
    )
    return _Sketch("bytes", "Bytes per device", caption, _draw_bytes, _before_any_round(facts))


def _draw_bytes(axes: "Axes", facts: RunFacts) -> None:
    rounds = [line["round"] for line in facts.history]
    sent = list(accumulate(line["upload_bytes_per_device"] for line in facts.history))
    received = list(accumulate(line["download_bytes_per_device"] for line in facts.history))
    factor, unit = next(
        (pair for pair in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if max(*sent, *received) >= pair[0]), (1.0, "bytes")
    )
    for values, label, line in ((sent, "sent", pictures.SOLID), (received, "received", pictures.DASHED)):
        axes.plot(
            rounds, [value / factor for value in values], label=label, clip_on=False, **pictures.line(line, len(rounds))
        )
    axes.set_ylim(bottom=0)
    axes.set_ylabel(f"{unit} per device, cumulative")


def _before_any_round(facts: RunFacts) -> str | None:
    return None if facts.rounds else "No round is finished yet."
