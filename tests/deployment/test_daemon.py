"""`fedmini device serve` in a real run: enrolled, fed and asked for consent by calls alone, and ended in mid-training.

One run of four devices, of which three are enough; the daemon is the fourth. Each test looks at one part of the story.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedmini import checkpoint, operator_keys, server_folder
from fedmini.device import kept_adapter
from fedmini.device.receipts import Receipts
from fedmini.privacy.device_ledger import DeviceLedger
from fedmini.secagg import device_keys, trust_text
from tests.deployment import chaos
from tests.deployment.deployed import TIMING, Deployment, a_config, deployment, wait_until, write_device_toml
from tests.device_service.serving import Client

pytestmark = pytest.mark.timeout(600)  # the first test brings up the deployment, and waits for the run

NAME = "phone"
NUM_EXAMPLES = 12
CHANGES = {
    "rounds": {"num_rounds": 3, "cohort_size": 4, "min_survivors": 3},
    "data": {"held_out_devices": 5},  # three people beside the daemon
    # The daemon's training takes long enough to be ended in it, and the adapter stays one that can be talked with.
    "local": {"num_steps": 20, "sampling_rate": 1.0, "learning_rate": 0.01},
}
PATIENT = {"wait_s": 120.0}  # for the daemon to be there, also once more


@dataclass
class Evidence:
    """What the run came to."""

    deployed: Deployment
    offered: Any  # the daemon's StatusResponse before it agreed
    exit_status: int
    seconds_to_end: float
    left_behind: tuple[list[int], list[int]]  # when it had ended: the rounds in its ledger, and those with a receipt
    status: Any  # its StatusResponse when the run was over
    receipts: list[Any]
    pieces: list[str]  # of a reply of more than a word, then


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Evidence]:
    folder = tmp_path_factory.mktemp("daemon")
    config, rows = a_config(folder, "example-local", CHANGES), chaos.marked_rows()
    socket = folder / "phone.sock"
    with deployment(folder, config, rows, timing=TIMING | PATIENT) as deployed, Client(socket) as client:
        server = deployed.start_server()
        operator_keys.create_device(folder / NAME)
        write_device_toml(folder / NAME, config, physical_batch_size=1)
        daemon = deployed.start_daemon(NAME, socket)
        daemon.wait_for("device.runs")
        enrol(deployed, client)
        client.add(*((row["prompt"], row["response"]) for row in rows[-NUM_EXAMPLES:]))
        wait_until(lambda: bool(client.call("Status").offers), "the run to be offered")
        server.wait_for("device.declines", device=NAME)
        offered = client.call("Status")
        client.call("Consent", manifest_hash=offered.offers[0].manifest_hash)
        deployed.start_devices()

        place = daemon.wait_for("device.answering", stage="CONTRIBUTE")
        daemon.wait_for("device.answering", since=place, stage="CONTRIBUTE")
        daemon.process.terminate()
        began = time.monotonic()
        exit_status = daemon.process.wait(30)
        seconds_to_end = time.monotonic() - began
        left_behind = written_down(folder / NAME)

        deployed.start_daemon(NAME, socket)
        deployed.devices[f"{NAME}, ended"] = daemon
        deployed.people = {**deployed.people, NAME: []}  # from here on it is looked at like any other
        server.wait_for("run.finished")
        assert server.process.wait(60) == 0, server.tail()
        yield Evidence(
            deployed,
            offered,
            exit_status,
            seconds_to_end,
            left_behind,
            status=client.call("Status"),
            receipts=list(client.call("Receipts")),
            pieces=spoken(client),
        )


def test_a_device_is_enrolled_fed_and_asked_over_grpc_and_then_takes_part(served: Evidence) -> None:
    assert (served.offered.name, served.offered.num_examples, served.offered.rounds_joined) == (NAME, NUM_EXAMPLES, 0)
    assert [run.run_id for run in served.offered.offers] == ["tiny-1"] and not served.offered.runs
    assert served.left_behind[1] == [1]


def test_a_daemon_that_is_terminated_in_mid_training_ends_well_and_the_run_goes_on_without_it(served: Evidence) -> None:
    print(f"it ended {served.seconds_to_end:.1f} s after SIGTERM")
    assert served.exit_status == 0
    assert served.seconds_to_end < 10
    assert served.left_behind == ([1, 2], [1]), "the second contribution was paid for, and never left"
    lines = [json.loads(line) for line in (served.deployed.run_folder / "metrics.jsonl").read_text().splitlines()][1:]
    assert [(line["num_sampled"], line["num_survivors"]) for line in lines] == [(4, 4), (4, 3), (4, 4)]


def test_a_daemon_that_is_started_again_takes_part_and_has_a_receipt_for_each_contribution_that_left(
    served: Evidence,
) -> None:
    status = served.status
    (run,) = status.runs
    assert (run.run_id, run.num_contributions, status.rounds_joined) == ("tiny-1", 3, 3)  # one was paid for in vain
    assert status.num_examples == NUM_EXAMPLES and not status.offers
    assert [(one.run_id, one.round_num, one.attempt) for one in served.receipts] == [("tiny-1", 1, 0), ("tiny-1", 3, 0)]
    assert {one.manifest_hash for one in served.receipts} == {run.manifest_hash}
    assert 0 < served.receipts[0].epsilon["example"] < served.receipts[1].epsilon["example"]
    assert served.receipts[1].epsilon == status.epsilon_spent
    chaos.check_paid_for(served.deployed)


def test_a_device_behind_grpc_replies_with_the_adapter_that_the_run_ended_with(served: Evidence) -> None:
    last = served.status.last_adapter
    assert (last.run_id, last.round_num) == ("tiny-1", 3)
    found = checkpoint.load(served.deployed.run_folder / "checkpoints")
    signed = trust_text.read_signed_manifest((served.deployed.run_folder / "manifest.signed.json").read_bytes())
    kept = kept_adapter.load(served.deployed.folder / NAME, signed.manifest)
    assert found is not None and kept is not None
    for name, values in found.state.adapter.items():
        assert np.array_equal(values, kept[name]), name
    assert all(served.pieces)


def test_nothing_that_came_over_grpc_is_in_a_log_or_in_any_file_but_the_store(served: Evidence) -> None:
    chaos.check_nothing_leaked(served.deployed)


def enrol(deployed: Deployment, client: Client) -> None:
    """What the device's owner, the operator and whoever runs the server do with what calls gave them."""
    keys = device_keys.read(client.call("PublicKeys").public_keys)
    with operator_keys.opened(deployed.folder / "operator", lambda: b"") as operator:
        certificate = operator.certify(keys.device_key, NAME)
    server_folder.opened(deployed.server_folder).enroll(keys, certificate)
    client.call(
        "Enrol",
        certificate=trust_text.write_certificate(certificate),
        operator_key=(deployed.folder / "operator" / "operator.pub").read_bytes(),
    )


def spoken(client: Client) -> list[str]:
    """The pieces of a reply: of the first that has several, as how long one gets is drawn."""
    while True:
        pieces = [piece.text for piece in client.call("Reply", prompt="abc", max_new_tokens=40)]
        if len(pieces) > 1:
            return pieces


def written_down(folder: Path) -> tuple[list[int], list[int]]:
    """The rounds that a device's ledger has paid for, once each, and those of which it has a receipt."""
    with DeviceLedger.open(folder / "ledger.jsonl") as ledger:
        paid = [one.round_num for one in ledger.releases() if not one.is_recovered]
    return paid, [one.round_num for one in Receipts(folder / "receipts.jsonl").read()]
