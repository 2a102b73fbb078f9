"""Kills at random moments, and what must hold after each: at the end, and in every file on the way."""

import base64
import json
import random
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives import serialization

from fedmini import checkpoint, simulation
from fedmini.config import RunConfig
from fedmini.privacy.ledger import read_ledger
from fedmini.types import Adapter
from tests import tiny_run
from tests.deployment.deployed import Deployment

MARKER = "abcabcabc"  # planted in every person's examples: it must be in no file but the encrypted store
PROCESSES = ("coordinator", "gate", "server")
MOMENTS = (
    ("coordinator", "run.began", {}),
    ("coordinator", "round.planned", {"round": 1}),
    ("coordinator", "stage.began", {"stage": "ADVERTISE"}),
    ("coordinator", "stage.began", {"stage": "SHARE"}),
    ("coordinator", "round.keyed", {"round": 1}),
    ("coordinator", "round.debited", {"round": 1}),
    ("coordinator", "stage.began", {"stage": "CONTRIBUTE"}),
    ("coordinator", "stage.began", {"stage": "AGREE"}),
    ("coordinator", "stage.began", {"stage": "UNMASK"}),
    ("coordinator", "round.aggregated", {"round": 1}),
    ("coordinator", "round.committed", {"round": 1}),
    ("coordinator", "round.debited", {"round": 2}),
    ("coordinator", "round.aggregated", {"round": 2}),
)


def simulated_adapter(config: RunConfig, folder: Path, rows: list[dict[str, Any]]) -> Adapter:
    """What an uninterrupted run gives: the simulation's, by the same seed."""
    secure = config.model_copy(update={"simulation": config.simulation.model_copy(update={"secure": True})})
    options = simulation.SimulationOptions(cache_dir=folder / "cache")
    return simulation.simulate(secure, data=rows, output=folder / "simulated", options=options).adapter


def kill_at_random(deployed: Deployment, seed: int) -> tuple[str, str]:
    """Wait for a moment drawn from the seed, then kill one process; which, and when."""
    draw = random.Random(seed)
    process = PROCESSES[seed % len(PROCESSES)]
    _, event, fields = draw.choice(MOMENTS)
    assert deployed.server is not None
    deployed.server.wait_for(event, **fields)
    delay_s = draw.random() * 0.4
    time.sleep(delay_s)  # the moment itself is what is random here: there is nothing to wait for
    deployed.kill(process)
    return process, f"{event} {fields} + {delay_s:.2f} s"


def check_adapter(deployed: Deployment, expected: Adapter) -> None:
    found = checkpoint.load(deployed.run_folder / "checkpoints")
    assert found is not None and found.state.round_num == deployed.config.rounds.num_rounds
    for name, values in expected.items():
        assert np.array_equal(values, found.state.adapter[name]), name


def check_paid_for(deployed: Deployment) -> None:
    """Every release has its debit, on both sides: nobody's ledger says less than what left."""
    run_id = f"{deployed.run}-1"
    lines = read_ledger(deployed.run_folder / "ledger.jsonl")
    debited = {(line["round"], line["attempt"]) for line in lines if line["state"] == "DEBITED"}
    for name in deployed.people:
        own = [json.loads(line) for line in (deployed.folder / name / "ledger.jsonl").read_text().splitlines()]
        receipts = deployed.folder / name / "receipts.jsonl"
        left = [json.loads(line) for line in receipts.read_text().splitlines()] if receipts.exists() else []
        released = {(one["round_num"], one["attempt"]) for one in left if one["run_id"] == run_id}
        written = {
            (line["round"], line["attempt"]) for line in own if line["state"] == "DEBITED" and line["run_id"] == run_id
        }
        assert released <= written <= debited, name
    committed = deployed.config.rounds.num_rounds
    assert {round_num for round_num, _ in debited} == set(range(1, committed + 1))


SECRET = re.compile(rb"PRIVATE KEY|flwr-signature|flwr-task-token")
MAY_HOLD_KEYS = {
    "device.key",
    "login.key",
    "operator.key",
    "ca.key",
    "server.key",
    "store.key",
    "loopback.token",
    "gate.json",
    "backup.tar",
}


def secrets_in(folder: Path) -> set[bytes]:
    """Every secret key of a deployment as it could be written somewhere: its bytes, in hex and in base64."""
    found: set[bytes] = set()
    for path in folder.rglob("*.key"):
        content = path.read_bytes()
        if b"PRIVATE KEY" in content:
            key = serialization.load_pem_private_key(content, None)
            if hasattr(key, "private_bytes_raw"):
                found.add(key.private_bytes_raw())
            else:
                numbers = key.private_numbers().private_value
                found.add(numbers.to_bytes((key.key_size + 7) // 8, "big"))
        elif len(content) == 32:  # the store's
            found.add(content)
    assert len(found) >= 5, "the keys of an operator, a server and devices"
    return {form for key in found for form in (key, key.hex().encode(), base64.b64encode(key).rstrip(b"="))}


def check_nothing_leaked(deployed: Deployment) -> None:
    """No secret and nothing of what a person typed in any file or log, but where it belongs."""
    secrets = secrets_in(deployed.folder)
    token = (deployed.server_folder / "loopback.token").read_bytes().strip()
    for path in deployed.folder.rglob("*"):
        if not path.is_file() or "cache" in path.parts or "simulated" in path.parts or path.suffix == ".gguf":
            continue
        content = path.read_bytes()
        assert MARKER.encode() not in content, path
        if path.name not in MAY_HOLD_KEYS:
            assert not any(secret in content for secret in secrets), path
            assert not SECRET.search(content), path
            assert token not in content, path
    for process in [deployed.server, *deployed.devices.values()]:
        assert process is not None
        log = "\n".join(process.lines)
        assert not any(secret in log.encode() for secret in secrets), process.name
        assert MARKER not in log and token.decode() not in log and not SECRET.search(log.encode()), process.name
        assert "Traceback" not in log, process.tail()


def marked_rows() -> list[dict[str, Any]]:
    """The tiny run's people, a marker in what each of them wrote."""
    return [{**row, "response": f"{MARKER} {row['response']}"} for row in tiny_run.rows()]
