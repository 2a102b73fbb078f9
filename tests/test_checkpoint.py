"""A saved state comes back bit for bit; after a crash there is the old one or the new one, never half of one."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from fedmini import checkpoint
from fedmini.checkpoint import Checkpoint
from fedmini.errors import StateError
from fedmini.types import LedgerPosition, Participation, ServerState


def a_checkpoint(round_num: int, fill: float = 0.5) -> Checkpoint:
    generator = np.random.default_rng(round_num)
    state = ServerState(
        round_num=round_num,
        adapter={"b": np.full((2, 3), fill, np.float32), "a": generator.normal(size=4).astype(np.float32)},
        num_updates=round_num,
        momentum=generator.normal(size=10).astype(np.float32),
        second_moment=None,
        participations={"device-1": Participation(2, 1)},
        ledger=LedgerPosition(round_num, "ab" * 32),
    )
    return Checkpoint("hash of the manifest", state, ({"round": 0, "eval_loss": 4.25},))


def test_a_saved_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    saved = a_checkpoint(3)
    checkpoint.save(tmp_path, saved)
    found = checkpoint.load(tmp_path)
    assert found is not None
    assert found.state.adapter.keys() == saved.state.adapter.keys()
    for name, value in saved.state.adapter.items():
        assert found.state.adapter[name].tobytes() == value.tobytes()
    assert found.state.momentum.tobytes() == saved.state.momentum.tobytes()
    assert found.state.second_moment is None
    assert found.state.participations == saved.state.participations
    assert found.state.ledger == saved.state.ledger
    assert (found.manifest_hash, found.history) == (saved.manifest_hash, saved.history)


def test_where_nothing_was_saved_there_is_none(tmp_path: Path) -> None:
    assert checkpoint.load(tmp_path / "never") is None


def test_the_newest_few_are_kept(tmp_path: Path) -> None:
    for round_num in range(5):
        checkpoint.save(tmp_path, a_checkpoint(round_num))
    assert sorted(path.name for path in tmp_path.glob("round-*")) == ["round-0003", "round-0004"]


@pytest.mark.parametrize("file", ["state.json", "tensors.safetensors"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_newest_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path, file: str, damage: str) -> None:
    checkpoint.save(tmp_path, a_checkpoint(1))
    checkpoint.save(tmp_path, a_checkpoint(2))
    path = tmp_path / "round-0002" / file
    raw = bytearray(path.read_bytes())
    if damage == "flip":
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
    elif damage == "cut":
        path.write_bytes(raw[: len(raw) // 2])
    else:
        path.unlink()
    found = checkpoint.load(tmp_path)
    assert found is not None
    assert found.state.round_num == 1


def test_where_all_are_damaged_nothing_starts_again_silently(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, a_checkpoint(1))
    (tmp_path / "round-0001" / "state.json").write_text("{}")
    with pytest.raises(StateError, match=r"every checkpoint .* is damaged"):
        checkpoint.load(tmp_path)


def test_a_half_written_checkpoint_is_never_seen(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, a_checkpoint(1))
    partial = tmp_path / ".round-0002.partial"
    partial.mkdir()
    (partial / "state.json").write_text(json.dumps({"half": True}))
    found = checkpoint.load(tmp_path)
    assert found is not None and found.state.round_num == 1
    checkpoint.save(tmp_path, a_checkpoint(2))
    found = checkpoint.load(tmp_path)
    assert found is not None and found.state.round_num == 2


WRITER = """
    import sys
    sys.path.insert(0, sys.argv[2])
    from pathlib import Path
    from tests.test_checkpoint import a_checkpoint
    from fedmini import checkpoint
    for round_num in range(1, 10**6):
        checkpoint.save(Path(sys.argv[1]), a_checkpoint(round_num, fill=float(round_num)))
        print(round_num, flush=True)
"""


def test_killed_at_any_moment_the_last_acknowledged_checkpoint_or_a_newer_one_is_there(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    for attempt in range(5):
        folder = tmp_path / str(attempt)
        writer = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WRITER), str(folder), str(root)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        acknowledged = 0
        for line in writer.stdout:
            acknowledged = int(line)
            if acknowledged >= 3 + 7 * attempt:
                break
        os.kill(writer.pid, signal.SIGKILL)
        acknowledged = max([acknowledged, *(int(line) for line in writer.stdout.read().split())])
        writer.wait()
        found = checkpoint.load(folder)
        assert found is not None
        assert found.state.round_num in (acknowledged, acknowledged + 1)
        assert found.state.adapter["b"][0, 0] == found.state.round_num


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(StateError, match="can't save a checkpoint"):
        checkpoint.save(blocked / "checkpoints", a_checkpoint(1))


def test_a_run_of_more_than_9999_rounds_keeps_its_newest(tmp_path: Path) -> None:
    """Names sort otherwise than numbers there."""
    for round_num in (9998, 9999, 10000, 10001):
        checkpoint.save(tmp_path, a_checkpoint(round_num))
    found = checkpoint.load(tmp_path)
    assert found is not None and found.state.round_num == 10001
    assert {path.name for path in tmp_path.glob("round-*")} == {"round-10000", "round-10001"}


def test_a_changed_state_is_noticed_in_an_older_checkpoint_too(tmp_path: Path) -> None:
    """LATEST knows only the newest; a participation that is forgotten in the one before would cost privacy."""
    checkpoint.save(tmp_path, a_checkpoint(1))
    checkpoint.save(tmp_path, a_checkpoint(2))
    (tmp_path / "round-0002" / "tensors.safetensors").unlink()
    older = tmp_path / "round-0001" / "state.json"
    older.write_bytes(older.read_bytes().replace(b'"count": 2', b'"count": 1'))
    with pytest.raises(StateError, match=r"every checkpoint .* is damaged"):
        checkpoint.load(tmp_path)
