"""The service is what clients/proto/device.proto says: its compiled form is of that file, and every field is filled in."""

import subprocess
import sys
from pathlib import Path

from google.protobuf import descriptor_pb2, json_format

from fedmini import device
from fedmini.device import DeviceReceipt, DeviceStatus, OfferedRun, RunStatus
from fedmini.device_service import answers, messages
from tests.device_service.serving import ROOT

STATUS = DeviceStatus(
    name="phone",
    is_running=True,
    is_connected=True,
    why_not_training="it is in use",
    problem="no network",
    num_examples=7,
    key_kept_in="the OS keyring",
    runs=(RunStatus("chat-1", "aa" * 32, 3, 12),),
    offers=(OfferedRun("chat-2", "bb" * 32, ("may cost 1", "against everyone")),),
    rounds_joined=3,
    epsilon_spent={"device": 0.5, "example": 1.25},
    lifetime_epsilon=10.0,
    lifetime_delta=1e-5,
    last_adapter=("chat-1", 2),
)


def test_the_compiled_descriptor_is_that_of_the_proto_file(tmp_path: Path) -> None:
    """To renew it: the command below, with fedmini/device_service/device.binpb as the output."""
    compiled = tmp_path / "device.binpb"
    command = ["-m", "grpc_tools.protoc", "-I", "clients/proto", f"--descriptor_set_out={compiled}", "device.proto"]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True, timeout=60)
    kept = (ROOT / "fedmini" / "device_service" / messages.DESCRIPTOR).read_bytes()
    parse = descriptor_pb2.FileDescriptorSet.FromString
    assert parse(kept) == parse(compiled.read_bytes())


def test_every_method_of_the_device_that_an_app_calls_is_in_the_service() -> None:
    in_process_only = {"start", "stop", "close", "reply", "add_example", "reply_in_pieces"}
    called = {name for name in vars(device.Device) if not name.startswith("_")} - in_process_only
    assert {"".join(part.title() for part in name.split("_")) for name in called} | {"Reply"} == set(messages.METHODS)


def test_a_status_says_all_that_the_device_knows_of_itself() -> None:
    assert set(DeviceStatus.__slots__) == set(messages.make("StatusResponse").DESCRIPTOR.fields_by_name)
    said = json_format.MessageToDict(answers.status(STATUS), preserving_proto_field_name=True)
    assert said == {
        "name": "phone",
        "is_running": True,
        "is_connected": True,
        "why_not_training": "it is in use",
        "problem": "no network",
        "num_examples": "7",
        "key_kept_in": "the OS keyring",
        "runs": [{"run_id": "chat-1", "manifest_hash": "aa" * 32, "num_contributions": "3", "max_contributions": "12"}],
        "offers": [{"run_id": "chat-2", "manifest_hash": "bb" * 32, "terms": ["may cost 1", "against everyone"]}],
        "rounds_joined": "3",
        "epsilon_spent": {"device": 0.5, "example": 1.25},
        "lifetime_epsilon": 10.0,
        "lifetime_delta": 1e-5,
        "last_adapter": {"run_id": "chat-1", "round_num": "2"},
    }


def test_a_receipt_says_all_that_the_device_wrote_down() -> None:
    kept = DeviceReceipt(1.5, "chat-1", 2, 3, "aa" * 32, 61440, "cc" * 32, {"example": 1.25})
    (said,) = answers.receipts([kept])
    assert set(DeviceReceipt.__slots__) == set(said.DESCRIPTOR.fields_by_name)
    assert json_format.MessageToDict(said, preserving_proto_field_name=True) == {
        "time": 1.5,
        "run_id": "chat-1",
        "round_num": "2",
        "attempt": "3",
        "manifest_hash": "aa" * 32,
        "size_bytes": "61440",
        "sha256": "cc" * 32,
        "epsilon": {"example": 1.25},
    }


def test_what_a_device_does_not_know_is_absent_and_not_empty() -> None:
    fields = {"name": None, "why_not_training": None, "problem": None, "last_adapter": None}
    said = answers.status(DeviceStatus(**{name: getattr(STATUS, name) for name in STATUS.__slots__} | fields))
    assert not any(said.HasField(name) for name in fields)
