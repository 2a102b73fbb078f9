"""privacy.json never says more than is true."""

import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedmini import planning, statement
from fedmini.privacy import accounting
from fedmini.privacy.ledger import Ledger
from fedmini.types import Manifest, Roster
from tests import tiny_run

BASE = planning.Base("base", (("x.lora_B.weight", (64, 4)),))


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(tmp_path / "ledger.jsonl", "run") as opened:
        yield opened


def a_manifest(tmp_path: Path, noise_multiplier: float) -> Manifest:
    protected = {"noise": "shared", "clip_norm": 1.0, "noise_multiplier": noise_multiplier, "target_delta": 1e-5}
    config = tiny_run.config(tmp_path, changes={"privacy": {"device": protected}})
    return planning.make_manifest(config, "run", BASE, None)


def release(manifest: Manifest, ledger: Ledger, round_num: int, seeded: bool = False) -> None:
    events = [accounting.event_of(unit, manifest) for unit in manifest.release.units]
    ledger.debit(Roster("run", round_num, 0, ("a", "b")), events, round_num, seeded)


@pytest.mark.parametrize("noise_multiplier", [0.7, 1.0, 1.3, 2.1])
def test_the_summary_never_rounds_epsilon_down(tmp_path: Path, ledger: Ledger, noise_multiplier: float) -> None:
    manifest = a_manifest(tmp_path, noise_multiplier)
    release(manifest, ledger, 1)
    found = statement.privacy_statement(manifest, ledger, is_secure=False)
    (said,) = re.findall(r"epsilon = ([0-9.]+) at", found["summary"])
    spent = found["guarantees"][0]["epsilon"]
    assert spent - 1e-9 <= float(said) < spent + 0.001 + 1e-9


def test_an_epsilon_without_bound_is_not_called_private(tmp_path: Path, ledger: Ledger) -> None:
    manifest = a_manifest(tmp_path, 0.045)
    release(manifest, ledger, 1)
    found = statement.privacy_statement(manifest, ledger, is_secure=False)
    assert math.isinf(found["guarantees"][0]["epsilon"])
    assert not found["is_private"]


def test_a_seeded_release_is_not_called_private(tmp_path: Path, ledger: Ledger) -> None:
    manifest = a_manifest(tmp_path, 1.0)
    release(manifest, ledger, 1)
    assert statement.privacy_statement(manifest, ledger, is_secure=False)["is_private"]
    release(manifest, ledger, 2, seeded=True)
    found = statement.privacy_statement(manifest, ledger, is_secure=False)
    assert not found["is_private"] and found["summary"].startswith(statement.SEEDED)


@pytest.mark.parametrize("subject", ["measured on", "floating-point", "digest", "seconds and memory"])
def test_what_leaves_a_run_without_noise_is_named(tmp_path: Path, ledger: Ledger, subject: str) -> None:
    found = statement.privacy_statement(a_manifest(tmp_path, 1.0), ledger, is_secure=False)
    assert any(subject in line for line in found["not_covered"])
