"""Numbers and sentences as a person reads them; nothing here is escaped for HTML yet."""

import math
from typing import Any

from fedmini.report.facts import Guarantee, RunFacts, is_finite

NOTHING = "\N{EN DASH}"
NO_PRIVACY = (
    "NO PRIVACY. This run was made with [privacy] none = true: no noise was added to anything. "
    "The adapter may reveal what any one example says. Do not share it."
)
SEEDED = (
    "SEEDED NOISE: THIS PROTECTS NOBODY. The noise of this run was drawn from a seed that is written beside it; "
    "whoever has the seed can take the noise away. The run is for reproducing. Every epsilon below is nominal."
)


def number(value: Any, decimals: int = 3) -> str:
    """A number with a fixed count of decimals and a real minus sign; a dash where there is none."""
    if not isinstance(value, int | float):
        return NOTHING
    return f"{value:,.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def with_error(value: Any, error: Any, decimals: int = 3) -> str:
    """A value and one standard deviation of the noise in it."""
    if not is_finite(value):
        return NOTHING
    return f"{number(value, decimals)} ± {number(error, decimals)}" if is_finite(error) else number(value, decimals)


def percent(fraction: Any, error: Any) -> str:
    """A fraction and its error, as percentages."""
    if not is_finite(fraction):
        return NOTHING
    return with_error(100 * fraction, 100 * error if is_finite(error) else None, decimals=1)


def epsilon(value: Any) -> str:
    """An epsilon with three decimals, rounded up: a report must not say less than was spent."""
    return number(math.ceil(value * 1000 - 1e-6) / 1000) if is_finite(value) else NOTHING


def delta(value: float) -> str:
    """A delta as a power of ten where it is short, and as one in so many."""
    mantissa, exponent = f"{value:.3g}".split("e") if "e" in f"{value:.3g}" else (f"{value:.3g}", "")
    short = f"{mantissa}e{int(exponent)}" if exponent else mantissa
    return f"{short} (1 in {1 / value:,.0f})"


def byte_size(value: float) -> str:
    """Bytes in the decimal unit that keeps the number short."""
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= factor:
            return f"{value / factor:,.2f} {unit}"
    return f"{value:,.0f} bytes"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever is readable."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds // 3600:.0f} h {seconds % 3600 / 60:.0f} min"


def measured_on(facts: RunFacts) -> str:
    """Whom the loss is measured on."""
    return "people who took no part" if facts.config.evaluation.source == "held_out" else "the evaluation file"


def headline(facts: RunFacts) -> str:
    """What happened, in a sentence or two."""
    evaluated = [line for line in facts.history if isinstance(line.get("eval_loss"), int | float)]
    losses = [line["eval_loss"] for line in evaluated]
    where = f"the loss on {measured_on(facts)}"
    if not facts.rounds:
        before = f": {where} is {number(losses[0])} nats a token before any training" if losses else ""
        return f"No round is finished yet, of {facts.num_rounds_planned}{before}."
    rounds = "1 round" if facts.num_rounds == 1 else f"{facts.num_rounds} rounds"
    beginning = f"In {rounds} of {_devices(facts)}"
    if len(losses) < 2:
        return f"{beginning}, {where} was not measured again.{_ending(facts)}"
    change = losses[-1] - losses[0]
    sign = "+" if change > 0 else ""
    last = evaluated[-1]["round"]
    when = f", measured after round {last}" if last < facts.num_rounds else ""
    return (
        f"{beginning}, {where} went from {number(losses[0])} to {number(losses[-1])} nats a token "
        f"({sign}{number(change)}{when}).{_ending(facts)}"
    )


def in_other_words(guarantee: Guarantee, is_seeded: bool) -> str:
    """What an epsilon says, for a reader who has never met one."""
    if is_seeded:
        return "nothing is promised: the noise can be taken away"
    if guarantee.epsilon == 0:
        return "nothing has been released yet"
    factor = math.exp(min(guarantee.epsilon, 700.0))
    shown = _at_least(factor)
    thing = "the example" if guarantee.unit == "example" else "the device"
    return (
        f"nothing that was released is more than {shown} times likelier with {thing} than without it, or the other way "
        "round, up to an allowance of delta (this is the worst case; the factor is e to the epsilon)"
    )


def _at_least(factor: float) -> str:
    """A factor in few digits, rounded up."""
    if factor < 10:
        return f"{math.ceil(factor * 100) / 100:,.2f}"
    if factor < 1e6:
        return f"{math.ceil(factor):,}"
    exponent = math.floor(math.log10(factor))
    return f"{math.ceil(factor / 10.0**exponent)}e+{exponent:02d}"


def _devices(facts: RunFacts) -> str:
    counts = [int(line["num_survivors"]) for line in facts.rounds]
    least, most = min(counts), max(counts)
    if least == most:
        return f"{most} device{'' if most == 1 else 's'}" + (" each" if facts.num_rounds > 1 else "")
    return f"{least} to {most} devices"


def _ending(facts: RunFacts) -> str:
    if facts.num_rounds >= facts.num_rounds_planned:
        return ""
    if facts.is_stated:
        return (
            f" The run ended there: for round {facts.num_rounds + 1} either the privacy budget or the number of devices "
            "was too small."
        )
    return f" The run is not finished: {facts.num_rounds_planned} rounds are planned."
