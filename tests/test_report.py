"""The report: what a reader must find on the page, and what must never get out of it."""

import json
import re
import struct
import subprocess
import sys
import zlib
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmini import report, rundir
from fedmini.config import parse_run_config
from fedmini.errors import StateError
from fedmini.privacy import chain
from fedmini.privacy.ledger import Ledger, read_ledger
from fedmini.report import facts, plots, wording
from fedmini.report import page as rendering
from fedmini.rundir import RunDirectory
from fedmini.types import ADJACENCY, LocalPlan, LoraShape, Manifest, PrivacyEvent, ReleasePlan, Roster, Unit, UnitPlan

RUN_ID = "chat-0a1b2c3d"
PLOTS = ("loss", "epsilon", "noise", "bytes")
LOSSES = (4.3104, 4.2213, 4.1001, 3.9502, 3.8444, 3.7551)


@dataclass(frozen=True)
class Story:
    """A run to be written to a directory, in the files' own formats, and reported on."""

    units: tuple[Unit, ...] = ("example",)
    seed: int | None = None
    source: str = "chitchat"
    num_rounds: int = 5
    num_done: int = 5
    is_stated: bool = True
    last_loss: float | None = LOSSES[5]
    has_training_loss: bool = True
    noise_to_signal: float | None = 0.842739127391


def write_run(path: Path, story: Story) -> RunDirectory:
    run = RunDirectory(path)
    path.mkdir(exist_ok=True)
    manifest = make_manifest(story)
    environment = {
        "data_sha256": "d" * 64,
        "compute_dtype": "float32",
        "accelerator": "cpu",
        "weights": "packed",
        "num_threads": 2,
        "processor": "x86_64",
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
    }
    rundir.begin(run, make_config(story), manifest, environment)
    rundir.write_metrics(run, [metrics_line(round_num, story) for round_num in range(story.num_done + 1)])
    run.ledger.unlink(missing_ok=True)
    for round_num in range(1, story.num_done + 1):
        debit(run, story, round_num, seeded=story.seed is not None)
    if story.is_stated:
        rundir.write_json(run.privacy, make_statement(story, manifest, run.ledger))
    return run


def make_config(story: Story):
    units = {
        unit: {"noise": "shared", "clip_norm": 1.0, "target_epsilon": 8.0, "target_delta": 1e-5} for unit in story.units
    }
    if len(units) == 2:
        units["example"]["noise"] = "local"
    values = {
        "run": {"name": "chat"} | ({"seed": story.seed} if story.seed is not None else {}),
        "base": {"name": "smollm2-135m-q4"},
        "data": {"source": story.source, "held_out_devices": 40},
        "local": {"sampling_rate": 0.1},
        "rounds": {"num_rounds": story.num_rounds, "cohort_size": 24},
        "privacy": units or {"none": True},
    }
    return parse_run_config(values)


def make_manifest(story: Story) -> Manifest:
    plans = {unit: UnitPlan(unit, "shared", 1.0, 0.6, 8192.0, 10**6, 18, 0.5987654321, 1e-5) for unit in story.units}
    release = ReleasePlan(
        plans.get("example"), plans.get("device"), 1.0, 8192.0, 24, 4, cohort_size=24, max_devices=24,
        min_survivors=20, n_honest=18, max_participations=5, max_releases=5, min_separation=1,
    )  # fmt: skip
    shape = LoraShape(4, 8.0, ("v_proj", "o_proj"), None, "B", 0)
    local = LocalPlan(1, 0.1, 20.0, 1.0, "sgd", 96, detach_prefix=False)
    budgets = tuple((unit, 8.0) for unit in story.units)
    return Manifest(RUN_ID, "f" * 64, shape, (("w", (4, 576)),), local, release, story.num_rounds, budgets)


def metrics_line(round_num: int, story: Story) -> dict[str, Any]:
    is_trained = round_num > 0
    has_training = is_trained and story.has_training_loss
    return {
        "round": round_num,
        "num_sampled": 24 if is_trained else 0,
        "num_survivors": 24 - round_num % 3 if is_trained else 0,
        "upload_bytes_per_device": 207372 if is_trained else 0,
        "download_bytes_per_device": 276480 if is_trained else 0,
        "seconds": 34.123456789 if is_trained else 0.0,
        "noise_to_signal": story.noise_to_signal if is_trained and story.units else None,
        "epsilon": {unit: 7.98765432109 * (round_num / 5) ** 0.5 for unit in story.units},
        "train_loss": LOSSES[min(round_num, 5)] + 0.1234567891 if has_training else None,
        "train_loss_error": 0.0912345678 if has_training else None,
        "clipped_fraction": 0.812345678 if has_training else None,
        "clipped_fraction_error": 0.0213456 if has_training else None,
        "eval_loss": story.last_loss if round_num == story.num_done else LOSSES[min(round_num, 5)],
        "peak_memory_bytes": 1_234_567_890,
    }


def debit(run: RunDirectory, story: Story, round_num: int, seeded: bool) -> None:
    """One more release in the run's ledger, for each of its units."""
    events = [PrivacyEvent(unit, "shared", 0.6, 0.1, 1, 1.0) for unit in story.units]
    with Ledger.open(run.ledger, RUN_ID) as ledger:
        ledger.debit(Roster(RUN_ID, round_num, 0, ("a", "b")), events, round_num, seeded)


def make_statement(story: Story, manifest: Manifest, ledger: Path) -> dict[str, Any]:
    lines = read_ledger(ledger)
    guarantees = [
        {
            "unit": unit,
            "adjacency": ADJACENCY[unit],
            "epsilon": 7.98765432109,
            "delta": 1e-5,
            "budget": 8.0,
            "mechanism": "each example's gradient is clipped to L2 norm 1 and rounded to integers; discrete Gaussian",
            "noise": "shared",
            "noise_multiplier": 0.6,
            "z_eff": 0.5987654321,
            "clip_norm": 1.0,
            "sampling_rate": 0.1,
            "steps_per_release": 1,
            "num_releases": 5,
            "holds_against": "everyone, the server included, while at least 18 devices of every round are honest",
            "assumes": ["the server sees the sum and no single contribution (secure aggregation)"],
            "epsilon_of_a_lone_honest_device": 143.20987654321,
            "n_honest": 18,
            "min_survivors": 20,
        }
        for unit in story.units
    ]
    return {
        "run_id": manifest.run_id,
        "manifest_hash": manifest.hash,
        "is_private": bool(story.units) and story.seed is None,
        "summary": "in one sentence",
        "guarantees": guarantees,
        "ledger_lines": len(lines),
        "ledger_hash": chain.position(lines, len(lines)).hash,
        "noise_was_seeded": story.seed is not None,
        "simulated": "the sum was formed in one process",
        "accountant": "dp-accounting, privacy loss distributions",
        "not_covered": ["the time a reply takes", "a person who uses several devices counts as several people"],
    }


class Reader(HTMLParser):
    """What a browser would see of a page: its elements, their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.alarms = 0
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.alarms += ("class", "alarm") in attrs

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def report_on(path: Path, story: Story) -> Reader:
    run = write_run(path, story)
    assert report.write_report(path) == run.report
    return Reader(run.report.read_text(encoding="utf-8"))


def page_of(path: Path, story: Story) -> Reader:
    """The page without its plots, which take most of the time."""
    write_run(path, story)
    return Reader(rendering.render(facts.read_facts(path), ()))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of a finished run, reported on."""
    path = tmp_path_factory.mktemp("runs") / "finished"
    report_on(path, Story())
    return path


@pytest.fixture(scope="module")
def page(finished):
    return Reader((finished / "report.html").read_text(encoding="utf-8"))


def test_the_page_says_in_one_sentence_what_happened(page):
    assert (
        "In 5 rounds of 22 to 24 devices, the loss on people who took no part went from 4.310 to 3.755 nats a token "
        "(\N{MINUS SIGN}0.555)."
    ) in page.text


def test_the_page_states_the_guarantee_whom_it_holds_against_and_what_it_rests_on(page):
    for words in (
        "One example",
        "differ by one example of a device's frozen training set added or removed",
        "7.988 (of a budget of 8)",
        "1e-5 (1 in 100,000)",
        "more than 2,945 times likelier",
        "discrete Gaussian",
        "everyone, the server included",
        "18 honest devices in every round, of at least 20 that answer",
        "its epsilon would be 143.210",
        "the server sees the sum and no single contribution",
        "the time a reply takes",
        "this is a simulation: the sum was formed in one process",
        "epsilon was computed with dp-accounting, privacy loss distributions",
    ):
        assert words in page.text


def test_the_page_shows_rounds_traffic_memory_settings_and_hashes(finished, page):
    manifest_hash = json.loads((finished / "manifest.json").read_text())["hash"]
    for words in (
        "22 of 24",
        "3.879 ± 0.091",
        "81.2 ± 2.1",
        "207.37 kB a round, at most 1.04 MB in all",
        "276.48 kB a round, at most 1.38 MB in all",
        "2.8 min, 34.1 s a round on average",
        "1.23 GB",
        'source = "chitchat"',
        "torch 2.13.0, transformers 5.23.0",
        manifest_hash,
        "f" * 64,
    ):
        assert words in page.text


def test_no_number_on_the_page_has_more_decimals_than_a_reader_can_use(page):
    shown = re.sub(r"(torch|transformers) [\d.]+", "", page.text)
    assert re.findall(r"\d+\.\d{5,}", shown) == []


def test_the_page_needs_nothing_from_anywhere_else(finished, page):
    html = (finished / "report.html").read_text(encoding="utf-8")
    assert not {"script", "link", "iframe", "img", "object", "embed", "base"} & set(page.tags)
    for name, value in page.attributes:
        if name in {"src", "href", "xlink:href", "action", "srcset", "data"}:
            assert value is not None and value.startswith("#"), (name, value)
    assert re.findall(r"https?:|@import|url\((?!#)", html) == []


def test_every_id_on_the_page_is_its_own_and_every_reference_is_met(page):
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {value[1:] for name, value in page.attributes if name == "href" and value} <= set(ids)


def test_every_plot_is_on_the_page_and_a_valid_png_beside_it(finished, page):
    assert page.tags.count("svg") == page.tags.count("figcaption") == len(PLOTS)
    assert sorted(path.name for path in (finished / "plots").iterdir()) == sorted(f"{name}.png" for name in PLOTS)
    for name in PLOTS:
        kinds = png_chunks((finished / "plots" / f"{name}.png").read_bytes())
        assert kinds[0] == b"IHDR" and kinds[-1] == b"IEND" and b"IDAT" in kinds


def png_chunks(content: bytes) -> list[bytes]:
    """The kinds of a PNG's chunks, each with its checksum verified."""
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    kinds, position = [], 8
    while position < len(content):
        (length,) = struct.unpack_from(">I", content, position)
        body = content[position + 4 : position + 8 + length]
        assert struct.unpack_from(">I", content, position + 8 + length) == (zlib.crc32(body),)
        kinds.append(body[:4])
        position += 12 + length
    return kinds


def test_the_same_run_gives_the_same_bytes(tmp_path):
    contents = []
    for name in ("first", "second"):
        run = write_run(tmp_path / name, Story())
        report.write_report(run.path)
        contents.append(
            [run.report.read_bytes(), *((run.path / "plots" / f"{plot}.png").read_bytes() for plot in PLOTS)]
        )
    assert contents[0] == contents[1]


def test_a_private_run_raises_no_alarm(page):
    assert page.alarms == 0


def test_a_run_without_privacy_says_so_loudly_and_gives_no_epsilon(tmp_path):
    page = report_on(tmp_path / "run", Story(units=()))
    assert page.alarms == 1
    assert "NO PRIVACY." in page.text
    assert "No epsilon to show: this run has no privacy." in page.text
    assert page.tags.count("svg") == 2  # loss and bytes
    assert (tmp_path / "run" / "plots" / "epsilon.png").exists()


@pytest.mark.parametrize("is_stated", [True, False])
def test_a_seeded_run_says_loudly_that_it_protects_nobody(tmp_path, is_stated):
    page = page_of(tmp_path / "run", Story(seed=7, is_stated=is_stated))
    assert page.alarms == 1
    assert "SEEDED NOISE: THIS PROTECTS NOBODY" in page.text
    assert "nominal only" in page.text
    assert "times likelier" not in page.text and "holds against everyone" not in page.text.lower()


def test_a_seed_that_only_the_ledger_remembers_is_seen(tmp_path):
    run = write_run(tmp_path / "run", Story(is_stated=False, num_done=2))
    debit(run, Story(), 3, seeded=True)
    assert Reader(rendering.render(facts.read_facts(run.path), ())).alarms == 1


def test_two_guarantees_stand_side_by_side_and_are_not_added_up(tmp_path):
    page = page_of(tmp_path / "run", Story(units=("example", "device")))
    assert "One example" in page.text and "One device" in page.text
    assert "never added up" in page.text
    assert page.text.count("7.988 (of a budget of 8)") == 2


def test_a_run_in_progress_is_reported_on(tmp_path):
    page = report_on(tmp_path / "run", Story(num_done=2, is_stated=False, last_loss=None))
    assert "In 2 rounds of 22 to 23 devices, the loss on people who took no part went from 4.310 to 4.221" in page.text
    assert "measured after round 1" in page.text
    assert "The run is not finished: 5 rounds are planned." in page.text
    assert "privacy.json does not stand yet" in page.text
    assert "5.052 (of a budget of 8)" in page.text  # 7.98765 * sqrt(2 / 5)


def test_a_run_that_has_measured_nothing_yet_is_reported_on(tmp_path):
    run = write_run(tmp_path / "run", Story(num_done=0, is_stated=False))
    run.metrics.unlink()
    run.ledger.unlink(missing_ok=True)
    report.write_report(run.path)
    page = Reader(run.report.read_text(encoding="utf-8"))
    assert "No round is finished yet, of 5." in page.text
    assert page.tags.count("svg") == 0


def test_a_run_before_its_first_round_shows_where_it_begins(tmp_path):
    page = report_on(tmp_path / "run", Story(num_done=0, is_stated=False, last_loss=LOSSES[0]))
    assert "No round is finished yet, of 5: the loss on people who took no part is 4.310 nats a token" in page.text
    assert page.tags.count("svg") == 1


def test_a_run_that_ended_early_says_so(tmp_path):
    page = page_of(tmp_path / "run", Story(num_done=3))
    assert "The run ended there: for round 4 either the privacy budget or the number of devices" in page.text


def test_a_statement_older_than_the_ledger_is_not_believed(tmp_path):
    run = write_run(tmp_path / "run", Story())
    debit(run, Story(), 6, seeded=False)
    page = Reader(rendering.render(facts.read_facts(run.path), ()))
    assert "privacy.json does not stand yet" in page.text


def test_a_ledger_line_that_is_being_written_counts_as_spent_and_is_left_alone(tmp_path):
    run = write_run(tmp_path / "run", Story(is_stated=False))
    with run.ledger.open("ab") as file:
        file.write(b'{"seq":6,"prev"')
    before = run.ledger.read_bytes()
    page = Reader(rendering.render(facts.read_facts(run.path), ()))
    assert "(6 lines)" in page.text
    assert run.ledger.read_bytes() == before


def test_a_ledger_with_a_changed_byte_is_refused(tmp_path):
    run = write_run(tmp_path / "run", Story())
    content = run.ledger.read_bytes()
    run.ledger.write_bytes(content.replace(b'"z_eff":0.6', b'"z_eff":0.7', 1))
    with pytest.raises(StateError, match=r"ledger.jsonl: line 1 was changed"):
        report.write_report(run.path)


def test_a_ledger_shorter_than_its_statement_is_refused(tmp_path):
    run = write_run(tmp_path / "run", Story())
    run.ledger.write_bytes(run.ledger.read_bytes().splitlines(keepends=True)[0])
    with pytest.raises(StateError, match="is not the one that"):
        report.write_report(run.path)


def test_rounds_whose_signal_was_lost_in_the_noise_are_named_not_drawn(tmp_path):
    page = report_on(tmp_path / "run", Story(noise_to_signal=None))
    assert "In no round could the signal be told from the noise" in page.text


def test_a_loss_that_is_no_number_is_shown_and_does_not_stop_the_report(tmp_path):
    page = report_on(tmp_path / "run", Story(last_loss=float("nan"), noise_to_signal=1e6))
    assert "went from 4.310 to nan nats a token" in page.text


def test_a_run_without_training_loss_has_no_column_for_it(tmp_path):
    page = page_of(tmp_path / "run", Story(has_training_loss=False))
    assert "Loss, training" not in page.text and "Loss, unseen" in page.text


@pytest.mark.parametrize(
    "source",
    [
        "</pre><script>alert(1)</script>",
        '" onload="alert(1)',
        "<img src=x onerror=alert(1)>",
        "&lt;b&gt; ' \\ </style>",
    ],
)
def test_a_setting_can_not_break_out_of_the_page(tmp_path, source):
    page = page_of(tmp_path / "run", Story(source=source))
    assert source in "".join(page.words)  # as text, and whole
    assert not {"script", "img", "b"} & set(page.tags)
    assert not {"onload", "onerror"} & {name for name, _ in page.attributes}


def test_a_unit_that_is_none_of_ours_does_not_reach_the_page(tmp_path):
    run = write_run(tmp_path / "run", Story(is_stated=False))
    lines = [line | {"epsilon": {"example": 1.0, "<script>": 2.0}} for line in rundir.read_metrics(run)]
    rundir.write_metrics(run, lines)
    report.write_report(run.path)
    assert "&lt;script" not in run.report.read_text(encoding="utf-8")
    assert "script" not in Reader(run.report.read_text(encoding="utf-8")).tags


def test_a_directory_that_holds_no_run_is_refused(tmp_path):
    with pytest.raises(StateError, match="is no run's directory"):
        report.write_report(tmp_path)
    with pytest.raises(StateError, match="is no run's directory"):
        report.write_report(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("manifest.json", b"{"),
        ("manifest.json", b'{"hash": "", "environment": {}, "manifest": {"run_id": "x"}}'),
        ("metrics.jsonl", b"[1]\n"),
        ("metrics.jsonl", b'{"round": 1\n'),
        ("metrics.jsonl", b'{"round": 1}\n'),
        ("privacy.json", b"{}"),
        ("privacy.json", b"[]"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, name, content):
    run = write_run(tmp_path / "run", Story(is_stated=name == "privacy.json"))
    (run.path / name).write_bytes(content)
    with pytest.raises(StateError, match=re.escape(name)):
        report.write_report(run.path)
    assert not run.report.exists()


def test_another_runs_statement_is_refused(tmp_path):
    run = write_run(tmp_path / "run", Story())
    other = write_run(tmp_path / "other", Story(num_rounds=6))
    run.privacy.write_bytes(other.privacy.read_bytes())
    with pytest.raises(StateError, match="belongs to another run"):
        report.write_report(run.path)


def test_a_report_is_replaced_whole_and_leaves_nothing_behind(tmp_path):
    story = Story(num_done=2, is_stated=False)
    report_on(tmp_path / "run", story)
    page = report_on(tmp_path / "run", replace(story, num_done=5, is_stated=True))
    assert "In 5 rounds" in page.text
    assert not [path for path in (tmp_path / "run").rglob("*") if path.name.endswith(".partial")]


def test_a_folder_that_can_not_be_written_is_an_error_of_ours(tmp_path):
    run = write_run(tmp_path / "run", Story())
    (run.path / "plots").write_bytes(b"a file where a folder should be")
    with pytest.raises(StateError, match="can't write the report"):
        report.write_report(run.path)


def test_importing_the_report_does_not_import_matplotlib():
    code = "import sys, fedmini.report; sys.exit('matplotlib' in sys.modules or 'torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_one_bad_training_loss_does_not_flatten_the_loss_that_counts():
    low, high = plots._loss_limits([4.0, 3.5], [90.0, -40.0])
    assert (low, high) == (2.875, 4.625)  # the span of 0.5 once more to either side, and a quarter as margin


@given(st.floats(min_value=0, max_value=1e6))
def test_an_epsilon_is_never_shown_smaller_than_it_is(value):
    shown = float(wording.epsilon(value).replace(",", ""))
    assert value - 1e-8 * max(value, 1) <= shown <= value + 0.001 + 1e-8 * value


def test_sizes_times_and_small_chances_read_as_a_person_would_say_them():
    assert [wording.byte_size(size) for size in (0, 999, 1000, 207_372, 5e6, 1.2e9)] == [
        "0 bytes", "999 bytes", "1.00 kB", "207.37 kB", "5.00 MB", "1.20 GB",
    ]  # fmt: skip
    assert [wording.duration(seconds) for seconds in (3.14, 89.96, 300, 7260)] == [
        "3.1 s", "90.0 s", "5.0 min", "2 h 1 min",
    ]  # fmt: skip
    assert wording.delta(1e-5) == "1e-5 (1 in 100,000)"
    assert wording.delta(2.5e-7) == "2.5e-7 (1 in 4,000,000)"
    assert wording.delta(0.001) == "0.001 (1 in 1,000)"


def test_a_report_holds_no_digest_of_the_private_examples(tmp_path):
    """With it, whoever guesses all examples but one could check every guess at that one: no noise is in a digest."""
    run = write_run(tmp_path / "run", Story())
    report.write_report(run.path)
    assert "d" * 64 not in run.report.read_text(encoding="utf-8")


def test_a_run_that_ran_out_of_devices_is_not_said_to_have_ended_by_its_budget(tmp_path):
    page = page_of(tmp_path / "run", Story(num_done=3))
    assert "would have passed the privacy budget" not in page.text


@pytest.mark.parametrize("factor", [1.0, 2.714, 9.991, 10.2, 999_999.5, 1.2e6, 9.7e20])
def test_a_factor_is_never_rounded_down(factor):
    assert factor <= float(wording._at_least(factor).replace(",", "")) <= factor * 2
