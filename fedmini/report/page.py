"""The report as one HTML page that needs nothing from anywhere else. Every text is escaped here, and only here."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from fedmini.report import wording
from fedmini.report.facts import Guarantee, RunFacts, is_finite
from fedmini.report.plots import Plot
from fedmini.report.stylesheet import STYLESHEET

LONG_TABLE = 40  # rounds; a longer table is folded away
# Should a text ever get past the escaping: the page may run no script and ask for nothing.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def render(facts: RunFacts, plots: Sequence[Plot]) -> str:
    """The whole page. The same facts give the same page: it carries no date of its own."""
    name = escape(facts.config.run.name)
    body = (
        _header(facts),
        _alarms(facts),
        _privacy(facts),
        _plots(plots),
        _rounds(facts),
        _costs(facts),
        _settings(facts),
        _origins(facts),
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name}: fedmini report</title>\n<style>{STYLESHEET}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + "\n</body>\n</html>\n"
    )


def _header(facts: RunFacts) -> str:
    base, data = facts.config.base, facts.config.data.source
    model = base.name or base.hub_id or str(base.path)
    return (
        f"<header><h1>{escape(facts.config.run.name)}</h1>\n"
        f'<p class="soft">fedmini run <code>{escape(str(facts.record["manifest"]["run_id"]))}</code>, base model '
        f"<code>{escape(model)}</code>, data <code>{escape(data)}</code></p></header>\n"
        f'<p class="headline">{escape(wording.headline(facts))}</p>'
    )


def _alarms(facts: RunFacts) -> str:
    if not facts.is_private:
        return f'<p class="alarm" role="alert">{escape(wording.NO_PRIVACY)}</p>'
    if facts.is_seeded:
        return f'<p class="alarm" role="alert">{escape(wording.SEEDED)}</p>'
    return ""


def _privacy(facts: RunFacts) -> str:
    parts = ["<h2>What is protected</h2>"]
    if not facts.is_private:
        parts.append("<p>Nothing. No epsilon can be given for this run.</p>")
    if facts.is_private and not facts.is_stated:
        parts.append(
            '<p class="note">The run has not ended, so <code>privacy.json</code> does not stand yet. This is the plan, '
            "and what was spent up to the last finished round; a round in progress is paid for already.</p>"
        )
    if len(facts.guarantees) > 1:
        parts.append("<p>These are separate guarantees for different units. They are never added up.</p>")
    if facts.guarantees:
        parts.append(_guarantees(facts))
    assumed = [item for guarantee in facts.guarantees for item in guarantee.assumes]
    assumed = list(dict.fromkeys([*assumed, *facts.grounds]))
    if assumed and facts.is_private:
        heading = "What this would rest on, were it not seeded" if facts.is_seeded else "What this rests on"
        parts.append(f"<h3>{heading}</h3>\n{_list(assumed)}")
    if facts.not_covered and facts.is_private:
        parts.append(f"<h3>What is not covered</h3>\n{_list(facts.not_covered)}")
    return "\n".join(parts)


def _guarantees(facts: RunFacts) -> str:
    columns = [_guarantee(guarantee, facts) for guarantee in facts.guarantees]
    rows = [
        [label, *(column[label] for column in columns)]
        for label in columns[0]
        if any(column[label] is not None for column in columns)
    ]
    return _table(rows, "facts", headers=("", *(f"One {guarantee.unit}" for guarantee in facts.guarantees)))


def _guarantee(guarantee: Guarantee, facts: RunFacts) -> dict[str, str | None]:
    budget = "no budget was set" if guarantee.budget is None else f"of a budget of {guarantee.budget:g}"
    nominal = ", nominal only" if facts.is_seeded else ""
    rests_on = None
    if guarantee.n_honest is not None:
        rests_on = (
            f"{guarantee.n_honest} honest devices in every round, of at least {guarantee.min_survivors} that answer"
        )
    return {
        "Compared runs (adjacency)": f"differ by {guarantee.adjacency}",
        "Epsilon": f"{wording.epsilon(guarantee.epsilon)} ({budget}{nominal})",
        "Delta": wording.delta(guarantee.delta),
        "In other words": wording.in_other_words(guarantee, facts.is_seeded),
        "Mechanism": guarantee.mechanism,
        "Noise": f"{guarantee.noise}; effective multiplier {wording.number(guarantee.z_eff, 4)}, "
        f"clip norm {guarantee.clip_norm:g}",
        "Holds against": _holds_against(guarantee, facts),
        "Rests on": rests_on,
        "If one device alone were honest": f"its epsilon would be {wording.epsilon(guarantee.epsilon_lone)}"
        if guarantee.epsilon_lone is not None
        else None,
        "Releases counted": f"{guarantee.num_releases:,}" if guarantee.num_releases is not None else None,
    }


def _holds_against(guarantee: Guarantee, facts: RunFacts) -> str | None:
    if facts.is_seeded:
        return "nobody: the seed that takes the noise away is written beside the run"
    return guarantee.holds_against


def _plots(plots: Iterable[Plot]) -> str:
    return "\n".join(["<h2>How it went</h2>", *(_figure(plot) for plot in plots)])


def _figure(plot: Plot) -> str:
    if plot.is_empty:
        return f"<h3>{escape(plot.title)}</h3>\n<p>{escape(plot.caption)}</p>"
    return (
        f"<figure><h3>{escape(plot.title)}</h3>\n{plot.svg}\n<figcaption>{escape(plot.caption)}</figcaption></figure>"
    )


def _rounds(facts: RunFacts) -> str:
    if not facts.history:
        return ""
    units = [guarantee.unit for guarantee in facts.guarantees]
    headers = ["Round", "Answered, of asked", "Loss, unseen"]
    if has_training := bool(facts.series("train_loss")):
        headers += ["Loss, training", "Clipped (%)"]
    headers += [f"Epsilon, {unit}" for unit in units]
    if facts.is_private:
        headers.append("Noise / signal")
    headers += ["Sent per device", "Received per device", "Time"]
    rows = [_round(line, units, has_training, facts.is_private) for line in facts.history]
    table = f'<div class="scroll">{_table(rows, "numbers", headers)}</div>'
    note = '<p class="soft">Losses are in nats a token. ± is one standard deviation of the noise.</p>'
    is_open = "" if len(rows) > LONG_TABLE else " open"
    return (
        f"<h2>Rounds</h2>\n<details{is_open}><summary>{len(facts.rounds)} rounds</summary>\n{note}\n{table}</details>"
    )


def _round(line: Mapping[str, Any], units: Sequence[str], has_training: bool, is_private: bool) -> list[str]:
    is_trained = line["round"] > 0
    cells = [str(line["round"]), f"{line['num_survivors']} of {line['num_sampled']}" if is_trained else wording.NOTHING]
    cells.append(wording.number(line.get("eval_loss")))
    if has_training:
        cells.append(wording.with_error(line.get("train_loss"), line.get("train_loss_error")))
        cells.append(wording.percent(line.get("clipped_fraction"), line.get("clipped_fraction_error")))
    cells += [wording.epsilon(line["epsilon"].get(unit)) for unit in units]
    if is_private:
        cells.append(wording.number(line.get("noise_to_signal"), 2))
    sent, received = line["upload_bytes_per_device"], line["download_bytes_per_device"]
    return cells + (
        [wording.byte_size(sent), wording.byte_size(received), wording.duration(line["seconds"])]
        if is_trained
        else [wording.NOTHING] * 3
    )


def _costs(facts: RunFacts) -> str:
    rounds = facts.rounds
    if not rounds:
        return ""
    seconds = sum(line["seconds"] for line in rounds)
    peaks = [line["peak_memory_bytes"] for line in facts.history if is_finite(line.get("peak_memory_bytes"))]
    rows = [
        ["A device sends", _traffic([line["upload_bytes_per_device"] for line in rounds])],
        ["A device receives", _traffic([line["download_bytes_per_device"] for line in rounds])],
        [
            "Time in rounds",
            f"{wording.duration(seconds)}, {wording.duration(seconds / len(rounds))} a round on average",
        ],
    ]
    if peaks:
        rows.append(["Peak memory", f"{wording.byte_size(max(peaks))}, of the process that ran the rounds"])
    return f"<h2>Bytes, time and memory</h2>\n{_table(rows, 'facts')}"


def _traffic(sizes: Sequence[int]) -> str:
    return f"{wording.byte_size(sizes[-1])} a round, at most {wording.byte_size(sum(sizes))} in all"


def _settings(facts: RunFacts) -> str:
    return (
        "<h2>Settings</h2>\n<details><summary><code>config.toml</code>, with every default</summary>\n"
        f"<pre>{escape(facts.config_text)}</pre></details>"
    )


def _origins(facts: RunFacts) -> str:
    environment = dict(facts.record["environment"])
    versions = environment.pop("versions", {})
    environment.pop("data_sha256", None)  # no noise is in a digest of private examples: not for the public
    rows = [[str(key).replace("_", " "), str(value)] for key, value in environment.items()]
    if isinstance(versions, dict):
        rows.append(["versions", ", ".join(f"{package} {number}" for package, number in versions.items())])
    ledger = (
        f"{facts.ledger.sha256} ({len(facts.ledger.lines)} lines)" if facts.ledger.sha256 else "nothing was debited"
    )
    hashes = [
        ["manifest", str(facts.record["hash"])],
        ["base model", str(facts.record["manifest"]["base_fingerprint"])],
        ["ledger.jsonl", ledger],
    ]
    return (
        f"<h2>Environment</h2>\n{_table(rows, 'facts')}\n"
        f'<h2>Hashes</h2>\n<p class="soft">SHA-256. Whoever has the same files gets the same hashes.</p>\n'
        f"{_table(hashes, 'facts')}"
    )


def _table(rows: Iterable[Sequence[str | None]], kind: str, headers: Sequence[str] = ()) -> str:
    """A table whose first column heads its rows."""
    head = "".join(f'<th scope="col">{escape(header)}</th>' for header in headers)
    body = "\n".join(
        f'<tr><th scope="row">{escape(first or "")}</th>'
        + "".join(f"<td>{escape(cell) if cell is not None else wording.NOTHING}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    top = f"<thead><tr>{head}</tr></thead>\n" if headers else ""
    return f'<table class="{kind}">\n{top}<tbody>\n{body}\n</tbody></table>'


def _list(items: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"
