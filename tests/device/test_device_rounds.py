"""A device in rounds: what it answers, what it writes down before, what it refuses, and when it stops."""

import hashlib
import json
import threading
import time
from pathlib import Path

import pytest

from fedmini.device import worker
from fedmini.errors import CohortError, StateError
from fedmini.flower import codec, replies
from fedmini.flower.codec import Envelope
from fedmini.model import loading
from fedmini.privacy.device_ledger import DeviceLedger
from fedmini.secagg.messages import Stage
from tests.device import world
from tests.device.world import LONG, Heard, Round, a_run, offered, wait_for_status


def begin(server, owned, manifest) -> Round:
    owned.device.start()
    ready = server.offer(offered(manifest))
    assert ready is not None and ready.kind == "ready", (ready, owned.device.status())
    return Round(manifest, server.ask)


def releases(owned) -> list[tuple[str, int, int]]:
    with DeviceLedger.open(owned.folder / "ledger.jsonl") as ledger:
        return [(one.run_id, one.round_num, one.attempt) for one in ledger.releases()]


def test_a_round_is_answered_and_what_left_is_what_the_receipt_says(base: Path, server, devices) -> None:
    manifest = a_run(base)
    owned = devices(manifest)
    work = begin(server, owned, manifest)
    assert work.run(1).num_devices == 4
    (receipt,) = owned.device.receipts()
    sent = work.answers[Stage.CONTRIBUTE]
    assert receipt.sha256 == hashlib.sha256(sent.payload).hexdigest()
    assert (receipt.size_bytes, receipt.run_id, receipt.round_num) == (len(sent.payload), "run-1", 1)
    assert abs(receipt.time - time.time()) < 120
    status = owned.device.status()
    assert status.rounds_joined == 1 and status.epsilon_spent == receipt.epsilon and receipt.epsilon["device"] > 0
    assert status.last_adapter == ("run-1", 0), "the model that it was given to begin from"
    assert status.why_not_training is None and status.problem is None
    assert [(run.num_contributions, run.max_contributions) for run in status.runs] == [(1, 3)]
    for answer in work.answers.values():
        assert answer.kind == "answer"


def test_every_answer_is_signed_by_the_device_for_the_very_message(base: Path, server, devices) -> None:
    manifest = a_run(base)
    owned = devices(manifest)
    owned.device.start()
    name = server.send(offered(manifest))
    answer = server.answer_to(name)
    replies.check(owned.device_key, name, answer)
    with pytest.raises(Exception, match="answers another message"):
        replies.check(owned.device_key, "0" * 64, answer)


def test_the_receipt_and_the_debit_are_on_the_disk_before_anything_leaves(base: Path, server, devices) -> None:
    manifest = a_run(base)
    owned = devices(manifest)
    seen: list[tuple[int, int]] = []

    def look(body: bytes) -> None:
        seen.append((len((owned.folder / "receipts.jsonl").read_bytes().splitlines()), len(releases(owned))))

    work = begin(server, owned, manifest)
    work.before = lambda stage: server.acts.update({"push-messages": look} if stage is Stage.CONTRIBUTE else {})
    work.run(1)
    assert seen[0] == (1, 1)


def test_where_the_receipt_cannot_be_written_nothing_leaves(base: Path, server, devices) -> None:
    manifest = a_run(base)
    owned = devices(manifest)
    (owned.folder / "receipts.jsonl").mkdir()
    work = begin(server, owned, manifest)
    with pytest.raises(CohortError):
        work.before = lambda stage: None
        Strict(work).run(1)
    assert work.reason(Stage.CONTRIBUTE) == ("protocol", "refused")
    assert "receipts.jsonl" in owned.device.status().problem
    assert releases(owned) == [("run-1", 1, 0)], "the debit stays"


class Strict:
    """A round of which nobody may be missing."""

    def __init__(self, work: Round) -> None:
        self._work = work

    def run(self, round_num: int, attempt: int = 0):
        found = self._work.run(round_num, attempt)
        if found.num_devices < 4:
            raise CohortError(f"{found.num_devices} devices")
        return found


def test_a_full_disk_for_the_adapter_does_not_keep_a_paid_contribution(base: Path, server, devices) -> None:
    manifest = a_run(base)
    owned = devices(manifest)
    (owned.folder / "adapters").write_bytes(b"in the way")
    work = begin(server, owned, manifest)
    assert work.run(1).num_devices == 4
    assert owned.device.status().last_adapter is None


def test_a_disk_that_takes_no_more_is_said_before_a_round_costs_anything(base: Path, server, devices) -> None:
    manifest = a_run(base)
    owned = devices(manifest)
    work = begin(server, owned, manifest)
    in_the_way = owned.folder / "room-to-write"
    in_the_way.mkdir()
    assert work.run(1).num_devices == 3
    assert work.reason(Stage.ADVERTISE) == ("protocol", "refused")
    assert releases(owned) == [] and owned.device.receipts() == ()
    status = owned.device.status()
    assert "make room" in status.problem and "make room" in status.why_not_training
    in_the_way.rmdir()
    assert work.run(1, attempt=1).num_devices == 4
    status = owned.device.status()
    assert status.problem is None and status.why_not_training is None


def test_room_for_what_a_round_writes_is_held_until_it_is_needed(base: Path, server, devices) -> None:
    """A disk that others fill up within the round takes the debit, and then what comes after it too."""
    manifest = a_run(base)
    owned = devices(manifest)
    work = begin(server, owned, manifest)
    room, sizes = owned.folder / "room-to-write", []
    work.before = lambda stage: sizes.append(room.stat().st_size if room.exists() else 0)
    assert work.run(1).num_devices == 4
    assert list(work.answers)[2] is Stage.CONTRIBUTE
    assert sizes == [0, 2**16, 2**16, 0, 0]


# When it stops.


def begin_long(base: Path, server, devices, **sections):
    """A device in the middle of a training that would take minutes."""
    manifest = a_run(base, "run-long", num_steps=LONG)
    owned = devices(manifest, **sections)
    work = begin(server, owned, manifest)
    results: list[object] = []
    work.ask = lambda envelope: server.ask(envelope, 20)

    def run() -> None:
        results.append(world.failure(lambda: results.append(work.run(1))))

    thread = threading.Thread(target=run)
    thread.start()
    world.wait_until(lambda: owned.folder.joinpath("ledger.jsonl").stat().st_size > 0, "the debit")
    return owned, work, thread, results


def test_training_stops_when_the_conditions_end_and_the_round_goes_on(base: Path, server, devices) -> None:
    owned, work, thread, results = begin_long(base, server, devices)
    owned.conditions.on_power = False
    ended = time.process_time()
    wait_for_status(owned.device, lambda status: not status.is_connected, "the end of the connection")
    assert time.process_time() - ended < 1.0, "of work, whatever else the machine does: training takes all that it gets"
    thread.join(60)
    assert results[0].num_devices == 3, "the round went on without it, as soon as it had refused"
    assert work.reason(Stage.CONTRIBUTE) == ("conditions", "conditions")
    status = wait_for_status(owned.device, lambda found: "battery" in str(found.why_not_training), "why it rests")
    assert status.problem is None, "nothing went wrong"
    assert releases(owned) == [("run-long", 1, 0)] and owned.device.receipts() == ()


def test_after_the_conditions_are_back_it_takes_part_again(base: Path, server, devices, monkeypatch) -> None:
    owned, _, thread, _ = begin_long(base, server, devices)
    owned.conditions.on_power = False
    thread.join(60)
    since = len(owned.heard.events)
    owned.conditions.on_power = True
    owned.heard.wait_for("device.connected", since)
    ready = server.offer(offered(a_run(base, "run-long", num_steps=LONG)))
    assert ready.kind == "ready"


@pytest.mark.parametrize(
    ("training", "reason"),
    [
        ({"max_seconds": 0.3}, "a round may take 0.3 seconds here; raise training.max_seconds"),
        ({"max_memory_bytes": 10 * 2**20}, "may hold 10 here; raise training.max_memory_bytes"),
    ],
)
def test_time_and_memory_of_a_round_are_bounded(base: Path, server, devices, training, reason) -> None:
    manifest = a_run(base, "run-long", num_steps=LONG)
    owned = devices(manifest, training=training)
    work = begin(server, owned, manifest)
    assert work.run(1).num_devices == 3
    assert reason in owned.device.status().problem
    is_memory = "max_memory_bytes" in training
    assert work.reason(Stage.ADVERTISE if is_memory else Stage.CONTRIBUTE) == ("conditions", "conditions")
    assert releases(owned) == ([] if is_memory else [("run-long", 1, 0)]), "what is known before costs nothing"
    assert owned.device.receipts() == ()
    assert reason in wait_for_status(owned.device, lambda status: status.problem is not None, "a problem").problem


def test_a_device_that_was_stopped_in_a_round_gives_the_same_in_the_next(base: Path) -> None:
    """What a training leaves behind in the model when it is interrupted changes nothing later."""
    from fedmini.contributor import Contributor
    from fedmini.data import Encoder, Example
    from fedmini.errors import ConditionsError
    from fedmini.model import loading
    from fedmini.model.lora import LoraModel
    from fedmini.types import TrainTask
    from tests.deployment import seeded

    manifest = a_run(base, "run-1", num_steps=3)
    _, section = world.tiny_base(base)
    loaded = loading.load_base(section, base / "cache", lambda note: None)
    encoder = Encoder(loaded.tokenizer, "chat", 64)
    examples = encoder.encode_all([Example(prompt, response) for prompt, response in world.EXAMPLES])
    task = TrainTask(manifest.hash, 1, 0, world.a_model(manifest))

    def contribute(model: LoraModel):
        return Contributor("anna", examples, model, manifest, seeded.streams, 1).contribute(task).vector

    undisturbed = contribute(LoraModel(loaded, manifest.lora))
    for num_calls in (1, 4, 7, 12):
        model, left = LoraModel(loaded, manifest.lora), [num_calls]

        def check(left=left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise ConditionsError("enough")

        model.interrupt_by(check)
        with pytest.raises(ConditionsError, match="enough"):
            contribute(model)
        model.interrupt_by(lambda: None)
        assert (contribute(model) == undisturbed).all()


def test_stop_ends_a_training_at_once_and_the_round_goes_on(
    base: Path, server, devices, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "LOGOUT_SECONDS", 30.0)  # on a busy machine, too, its refusal arrives
    monkeypatch.setattr(worker, "STOP_SECONDS", 60.0)
    owned, work, thread, results = begin_long(base, server, devices)
    began = time.process_time()
    owned.device.stop()
    assert time.process_time() - began < 0.5, "of work: a layer of one batch, and a logout"
    assert owned.device.status().why_not_training == "it was stopped"
    thread.join(60)
    assert results[0].num_devices == 3 and work.reason(Stage.CONTRIBUTE) == ("conditions", "conditions")
    assert owned.device.receipts() == ()


def test_close_ends_a_poll_that_waits_within_seconds(base: Path, server, devices) -> None:
    owned = devices(a_run(base))
    owned.device.start()
    owned.heard.wait_for("device.connected")
    world.wait_until(lambda: server.calls[-1] == "pull-messages", "a poll")
    began = time.monotonic()
    owned.device.close()
    assert time.monotonic() - began < 5, "it is held for 15 seconds"
    assert server.calls[-1] == "deactivate-node", "and it has logged out"


def test_the_contribution_that_uses_up_the_day_is_brought_to_its_end(base: Path, server, devices) -> None:
    manifest = a_run(base)
    owned = devices(manifest, conditions={"max_contributions_per_day": 1})
    work = begin(server, owned, manifest)

    def wait_as_for_others(stage: Stage) -> None:
        if stage is Stage.AGREE:  # long enough for the look-out to see that the day is used up
            since = time.monotonic()
            world.wait_until(lambda: time.monotonic() - since > 1.0, "the others")

    work.before = wait_as_for_others
    assert work.run(1).num_devices == 4
    assert [answer.kind for answer in work.answers.values()] == ["answer"] * 5
    assert work.run(2).num_devices == 3, "and the next does not begin"
    assert work.reason(Stage.ADVERTISE) == ("conditions", "conditions")
    wait_for_status(owned.device, lambda status: "as often as it may a day" in str(status.why_not_training), "why")


# When it begins again.


def stop_and_start(owned) -> None:
    owned.device.stop()
    owned.device.start()


def enrol_again(owned) -> None:
    """The same certificate: fine, as `enrol` says."""
    world.enrol(owned.device, owned.folder)


@pytest.mark.parametrize("begin_again", [stop_and_start, enrol_again])
def test_a_device_that_began_again_takes_part_in_the_next_round(base: Path, server, devices, begin_again) -> None:
    manifest = a_run(base)
    owned = devices(manifest)
    assert begin(server, owned, manifest).run(1).num_devices == 4
    begin_again(owned)
    assert begin(server, owned, manifest).run(2).num_devices == 4
    assert len(owned.device.receipts()) == 2 and owned.device.status().problem is None


def test_a_device_stopped_while_its_base_is_loading_takes_part_once_started(
    base: Path, server, devices, monkeypatch
) -> None:
    monkeypatch.setattr(worker, "STOP_SECONDS", 0.2)  # loading is a library's, and holds the thread for longer
    is_loading, may_load, load = threading.Event(), threading.Event(), loading.load_base

    def load_slowly(*arguments: object) -> object:
        is_loading.set()
        assert may_load.wait(world.WAIT_S)
        return load(*arguments)

    monkeypatch.setattr(loading, "load_base", load_slowly)
    manifest = a_run(base)
    owned = devices(manifest)
    owned.device.start()
    server.send(offered(manifest))
    assert is_loading.wait(world.WAIT_S)
    (given_up,) = (one for one in threading.enumerate() if one.name == "fedmini-device")
    owned.device.stop()
    may_load.set()
    owned.device.start()
    work = begin(server, owned, manifest)
    work.before = lambda stage: given_up.join() if stage is Stage.SHARE else None  # its end costs the round nothing
    assert [work.run(round_num).num_devices for round_num in (1, 2)] == [4, 4]


# What it refuses, from its own ledger.


@pytest.mark.parametrize(("round_num", "attempt"), [(2, 1), (2, 0), (1, 7)])
def test_a_server_restored_from_a_backup_is_refused(base: Path, server, devices, round_num: int, attempt: int) -> None:
    manifest = a_run(base)
    owned = devices(manifest)
    work = begin(server, owned, manifest)
    work.run(2, attempt=1)
    owned.device.close()
    owned = devices(manifest, examples=[])  # another process, for what its memory is worth
    work = begin(server, owned, manifest)
    assert work.run(round_num, attempt).num_devices == 3
    assert work.reason(Stage.ADVERTISE) == ("replayed", "replayed")
    assert releases(owned) == [("run-1", 2, 1)] and len(owned.device.receipts()) == 1


def test_a_device_gives_no_more_often_than_it_agreed_to_and_says_so(base: Path, server, devices) -> None:
    manifest = a_run(base)
    owned = devices(manifest)
    work = begin(server, owned, manifest)
    for round_num in (1, 2, 3):
        assert work.run(round_num).num_devices == 4
    assert "as often as it may: 3 times" in owned.device.status().why_not_training
    assert work.run(4).num_devices == 3
    code, reason = work.reason(Stage.ADVERTISE)
    assert code == "protocol" and "at most 3 contributions" in reason
    assert len(owned.device.receipts()) == 3


def test_rounds_too_close_together_are_refused(base: Path, server, devices) -> None:
    manifest = a_run(base, "run-apart", min_separation=3)
    owned = devices(manifest)
    work = begin(server, owned, manifest)
    work.run(1)
    assert work.run(3).num_devices == 3
    assert "3 rounds or more since round 1" in work.reason(Stage.ADVERTISE)[1]
    assert work.run(4).num_devices == 4


def test_the_lifetime_limit_stops_it_before_it_is_passed(base: Path, server, devices) -> None:
    manifest = a_run(base)
    owned = devices(manifest, device={"lifetime_epsilon": 2.5, "lifetime_delta": 1e-5})
    work = begin(server, owned, manifest)
    assert work.run(1).num_devices == 4
    assert work.run(2).num_devices == 3
    assert work.reason(Stage.ADVERTISE) == ("budget", "budget")
    status = owned.device.status()
    assert status.epsilon_spent["device"] <= 2.5 and "lifetime device epsilon of at most 2.5" in status.problem


# Messages.


def test_a_message_that_comes_again_gets_the_very_same_answer_and_nothing_new_happens(
    base: Path, server, devices
) -> None:
    manifest = a_run(base)
    owned = devices(manifest)
    work = begin(server, owned, manifest)
    again: list[tuple[Envelope, Envelope | None]] = []

    def twice(envelope: Envelope) -> Envelope | None:
        first = server.ask(envelope)
        server.send_again(server.last)
        second = server.answer_to(server.last.message_id)
        again.append((first, second))
        return first

    work.ask = twice
    assert work.run(1).num_devices == 4
    assert len(again) == 5 and all(first == second for first, second in again)
    assert len(owned.device.receipts()) == 1 and releases(owned) == [("run-1", 1, 0)]


def test_a_message_that_comes_again_much_later_gets_no_other_answer(base: Path, server, devices) -> None:
    manifest = a_run(base)
    owned = devices(manifest)
    owned.device.start()
    server.offer(offered(manifest))
    oldest = server.last
    for number in range(4):
        server.ask(Envelope("greeting", {"number": number}))
    server.send_again(oldest)
    later = server.send(Envelope("greeting", {"number": 5}))
    reply = server.replies.get(timeout=30)
    assert reply.about == later, "the old one is not answered a second time"


def test_messages_of_a_program_that_has_ended_are_ignored(base: Path, server, devices) -> None:
    manifest = a_run(base)
    owned = devices(manifest)
    work = begin(server, owned, manifest)
    server.run = 2
    assert server.offer(offered(manifest)).kind == "ready"
    for old in (Envelope("request", {"manifest": manifest.hash, "stage": "ADVERTISE"}), offered(manifest)):
        server.send_message(codec.pack(old), run=1)
    newer = server.send(Envelope("greeting"))
    assert server.replies.get(timeout=30).about == newer, "nothing was said to the old ones"
    assert work.run(1).num_devices == 4


def test_a_message_of_a_run_that_was_never_offered_is_refused(base: Path, server, devices) -> None:
    manifest = a_run(base)
    owned = devices(manifest)
    owned.device.start()
    answer = server.ask(Envelope("request", {"manifest": manifest.hash, "stage": "ADVERTISE"}))
    assert (answer.kind, answer.fields["code"]) == ("refusal", "stranger")
    assert "no run was offered" in owned.device.status().why_not_training


# Examples.


def test_nothing_is_frozen_before_there_is_an_example_to_train_on(base: Path, server, devices) -> None:
    manifest = a_run(base)
    owned = devices(manifest, examples=[])
    owned.device.start()
    answer = server.offer(offered(manifest))
    assert (answer.kind, answer.fields["code"]) == ("refusal", "conditions")
    assert "no example to train on yet: add some" in owned.device.status().why_not_training
    owned.device.add_example("Ω", "Ω" * 3)  # no token of it is in the tiny vocabulary
    server.offer(offered(manifest))
    owned.device.add_example("a bee", "what is it")
    assert server.offer(offered(manifest)).kind == "ready"
    assert Round(manifest, server.ask).run(1).num_devices == 4


def test_what_is_added_later_does_not_change_the_set_of_a_run(base: Path, server, devices) -> None:
    manifest = a_run(base)
    owned = devices(manifest)
    work = begin(server, owned, manifest)
    work.run(1)
    owned.device.add_examples([("more", "a bed")] * 5)
    work.run(2)
    frozen = owned.device._examples.freeze("run-1", 100)
    assert [(one.prompt, one.response) for one in frozen] == world.EXAMPLES
    assert owned.device.status().num_examples == len(world.EXAMPLES) + 5


def test_examples_are_added_by_several_threads_while_it_trains(base: Path, server, devices) -> None:
    owned, _, thread, _ = begin_long(base, server, devices)
    failures: list[object] = []

    def add() -> None:
        for _ in range(10):
            failures.append(world.failure(lambda: owned.device.add_example("a cab", "and that")))

    adders = [threading.Thread(target=add) for _ in range(4)]
    for adder in adders:
        adder.start()
    for adder in adders:
        adder.join(60)
    assert failures == [None] * 40 and owned.device.status().num_examples == len(world.EXAMPLES) + 40
    owned.device.stop()
    thread.join(60)


def test_a_status_asked_for_all_the_time_costs_no_round(base: Path, server, devices) -> None:
    """Both read the ledger, which one has open at a time."""
    manifest = a_run(base)
    owned = devices(manifest)
    work = begin(server, owned, manifest)
    is_over, failures = threading.Event(), []

    def ask() -> None:
        while not is_over.is_set():
            failures.append(world.failure(owned.device.status))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        assert [work.run(round_num).num_devices for round_num in (1, 2, 3)] == [4, 4, 4]
    finally:
        is_over.set()
        thread.join(30)
    assert set(failures) == {None}


def test_an_app_may_call_every_method_from_its_log(base: Path, server, devices) -> None:
    manifest = a_run(base)
    found: list[object] = []

    def react(event: str, **fields: object) -> None:
        if event == "device.contributed":
            found.append(owned.device.status().rounds_joined)
            owned.device.add_example("a cab")
        if event == "device.answering" and fields["stage"] == "AGREE":
            owned.device.stop()
            found.append("stopped")

    owned = devices(manifest, heard=Heard(also=react))
    work = begin(server, owned, manifest)
    work.ask = lambda envelope: server.ask(envelope, 3)
    work.run(1)
    assert work.answers[Stage.AGREE] is None
    assert found == [1, "stopped"]
    with pytest.raises(StateError, match="open in another Device"):
        devices(manifest)
    assert json.loads((owned.folder / "receipts.jsonl").read_text())["round_num"] == 1
