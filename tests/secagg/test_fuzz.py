"""Every parser against spoilt inputs: nothing but our own errors, in one line, in little memory and time.

A minute in all within `make test`; `make fuzz` gives each parser FUZZ_MINUTES=10 and says how many inputs it had.
"""

import json
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import msgpack
import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, x25519
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fedmini import enrolment, floors, manifest_file, operator_keys, planning
from fedmini.config import dump_run_config, load_device_config, load_run_config, load_server_config
from fedmini.errors import ConfigError, FedMiniError, StateError, UpdateError
from fedmini.privacy.device_ledger import DeviceLedger, DeviceRelease, LifetimeLimits
from fedmini.secagg import checks, device_keys, rotation, signed_manifest, signing_keys, trust, trust_text, wire
from fedmini.secagg.messages import KeyList, Message, Stage
from fedmini.server_folder import roll
from fedmini.types import Manifest, PrivacyEvent
from tests import tiny_run, tiny_trust
from tests.secagg import mutation
from tests.secagg.any_message import KINDS, MESSAGES, REQUESTS
from tests.secagg.cohort import Cohort
from tests.secagg.mutation import Form
from tests.secagg.recorded_round import RecordedRound, decoded

MEMORY_FOR_EACH_BYTE, MEMORY_IN_ANY_CASE = 64, 2**20
SECONDS = 5.0  # of processor time for one input, on a machine however slow
MAX_ERROR_LENGTH = 1000
MAX_MESSAGE_BYTES = 2**17
STAGES = tuple(Stage)[:-1]  # but for DONE

Read = Callable[[bytes], object]


@dataclass(frozen=True, repr=False)
class Parser:
    """What is attacked. `prepare` gives a function that reads one input and is then thrown away."""

    name: str
    prepare: Callable[[Path], Read]
    seeds: Callable[[Path], st.SearchStrategy[bytes]]  # inputs that it accepts, mostly
    form: Form
    num_inputs: int = 250  # within `make test`
    memory: int | None = MEMORY_IN_ANY_CASE  # None: neither memory nor time is bounded by the input's size
    is_foreign: bool = True  # what somebody else wrote: its text must not come out in an error, which may be logged


@dataclass
class Tally:
    """What came of the inputs."""

    outcomes: Counter[str] = field(default_factory=Counter)
    peak: int = 0


def attack(parser: Parser, folder: Path, content: bytes, tally: Tally) -> None:
    """Read one input. Raises whatever isn't a FedMiniError, and AssertionError where too much was needed."""
    read = parser.prepare(folder)
    outcome, message, peak = "accepted", "", 0
    began = time.process_time()
    if parser.memory is not None:
        tracemalloc.start()
    try:
        read(content)
    except FedMiniError as error:
        outcome, message = type(error).__name__, str(error)
    finally:
        if parser.memory is not None:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    seconds = time.process_time() - began
    tally.outcomes[outcome] += 1
    tally.peak = max(tally.peak, peak)
    if parser.memory is not None:
        allowed = MEMORY_FOR_EACH_BYTE * len(content) + parser.memory
        assert peak <= allowed, f"{len(content)} bytes took {peak} bytes of memory, {allowed} are allowed"
        assert seconds <= SECONDS, f"{len(content)} bytes took {seconds:.1f} seconds"
    if parser.is_foreign:
        assert message.isprintable() and len(message) <= MAX_ERROR_LENGTH, "an error is more than a line of text"


def attack_with(parser: Parser, folder: Path, inputs: st.SearchStrategy[bytes], num_inputs: int, tally: Tally) -> None:
    """Read so many inputs. hypothesis makes what it finds small."""

    @settings(
        max_examples=num_inputs, deadline=None, suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink), database=None,
    )  # fmt: skip
    @given(inputs)
    def attacked(content: bytes) -> None:
        attack(parser, folder, content, tally)

    attacked()


def search(parser: Parser, folder: Path, minutes: float) -> Tally:
    """Attack a parser for so long, or with its number of inputs where that is none."""
    tally = Tally()
    spoilt = mutation.inputs(parser.seeds(folder), parser.form)
    end = time.monotonic() + 60 * minutes
    attack_with(parser, folder, spoilt, parser.num_inputs, tally)
    while time.monotonic() < end:
        attack_with(parser, folder, spoilt, 2000, tally)
    return tally


# The protocol


@cache
def the_round() -> RecordedRound:
    return RecordedRound()


def any_message(*kinds: type[Message]) -> st.SearchStrategy[bytes]:
    """What was really sent, and what could be."""
    recorded = [content for content in the_round().messages() if KINDS[content[2] - 1] in kinds]
    return st.sampled_from(recorded) | st.one_of(*(MESSAGES[kind] for kind in kinds)).map(wire.encode)


def wire_parser(kind: type[Message]) -> Parser:
    def read(content: bytes) -> None:
        assert wire.encode(wire.decode(content, kind, MAX_MESSAGE_BYTES)) == content

    return Parser(f"wire.decode, {kind.__name__}", lambda _: read, lambda _: any_message(kind), mutation.MSGPACK)


def read_request(content: bytes) -> None:
    assert wire.encode(wire.decode_request(content, MAX_MESSAGE_BYTES)) == content


P = 2**255 - 19
keys_of_a_corrupt_device = (
    st.binary(min_size=32, max_size=32)
    | st.sampled_from(sorted(checks.SMALL_ORDER))
    | st.integers(P - 20, 2**255 - 1).map(lambda u: u.to_bytes(32, "little"))
    | st.integers(2**255, 2**255 + 20).map(lambda u: u.to_bytes(32, "little"))
)


def key_list_with(mask_key: bytes, share_key: bytes) -> bytes:
    """The list of keys in which those of one device are any, signed by that device."""
    key_list = decoded(the_round().requests[Stage.SHARE]["d000"], KeyList)
    advert = the_round().advert("d003", mask_key, share_key)
    return wire.encode(
        replace(key_list, adverts=tuple(advert if old.sender == "d003" else old for old in key_list.adverts))
    )


def corrupt_advert(mask_key: bytes, share_key: bytes) -> bytes:
    return wire.encode(the_round().advert("d000", mask_key, share_key))


def device_parser(stage: Stage) -> Parser:
    def seeds(_: Path) -> st.SearchStrategy[bytes]:
        own = st.just(the_round().requests[stage]["d000"])
        if stage is Stage.SHARE:
            own |= st.builds(key_list_with, keys_of_a_corrupt_device, keys_of_a_corrupt_device)
        return own | st.sampled_from(the_round().messages())

    def prepare(_: Path) -> Read:
        return the_round().device_at(stage, "d000").step

    return Parser(f"DeviceSession.step, {stage.name}", prepare, seeds, mutation.MSGPACK, 150)


def server_parser(stage: Stage) -> Parser:
    """One device sends anything: it costs that one the round, and never the others."""

    def seeds(_: Path) -> st.SearchStrategy[bytes]:
        own = st.just(the_round().answers[stage]["d000"])
        if stage is Stage.ADVERTISE:
            own |= st.builds(corrupt_advert, keys_of_a_corrupt_device, keys_of_a_corrupt_device)
        return own | st.sampled_from(the_round().messages())

    def prepare(_: Path) -> Read:
        server = the_round().server_at(stage)
        honest = [item for item in the_round().answers[stage].items() if item[0] != "d000"]

        def read(content: bytes) -> None:
            for device, _ in server.step([("d000", content), *honest]):
                assert device in the_round().cohort.devices
            assert {refusal.device for refusal in server.refusals} <= {"d000"}
            if stage is Stage.UNMASK:
                expected = the_round().cohort.sum_of(the_round().survivors)
                np.testing.assert_array_equal(server.cohort_sum.total, expected)
            if server.refusals:
                raise UpdateError(server.refusals[0].reason)

        return read

    return Parser(f"ServerSession.step, {stage.name}", prepare, seeds, mutation.MSGPACK, 150)


# What the operator signs, and what a device keeps


@cache
def manifests(folder: Path) -> tuple[Manifest, ...]:
    """One for each way of protecting."""
    base = planning.Base("ab" * 32, (("x.lora_A.weight", (2, 64)), ("x.lora_B.weight", (64, 2))))
    configs = (tiny_run.config(folder, privacy) for privacy in tiny_run.PRIVACY)
    return tuple(planning.make_manifest(config, "tiny-0a1b2c3d", base, None) for config in configs)


def canonical(folder: Path) -> st.SearchStrategy[bytes]:
    return st.sampled_from([manifest_file.canonical(manifest) for manifest in manifests(folder)])


OPERATOR, SUCCESSOR = tiny_trust.an_operator(), tiny_trust.an_operator()
TRUST = tiny_trust.trust_in(OPERATOR)
CERTIFICATES = [tiny_trust.enrol(OPERATOR, name).certificate for name in ("d000", "a device", "\u00e9")]
REVOCATIONS = trust.revoke(OPERATOR, None, [certificate.device_key for certificate in CERTIFICATES])
ROTATION = rotation.rotate(OPERATOR, signing_keys.public_bytes(SUCCESSOR))


DEVICE = signing_keys.draw()
DEVICE_KEYS = device_keys.vouch(DEVICE, device_keys.login_bytes(device_keys.draw_login()))
ENROLLED = roll.pair(DEVICE_KEYS, trust.certify(OPERATOR, "anna", DEVICE_KEYS.device_key))


def read_device_keys(content: bytes) -> None:
    assert device_keys.write(device_keys.read(content)) == content


def read_enrolled_device(content: bytes) -> None:
    assert roll.write_device(roll.read_device(content)) == content


def read_certificate(content: bytes) -> None:
    TRUST.check_certificate(trust_text.read_certificate(content))


def read_revocations(content: bytes) -> None:
    TRUST.updated(trust_text.read_revocations(content))


def read_rotations(content: bytes) -> None:
    rotation.follow(TRUST.operator_key, trust_text.read_rotations(content))


def read_signed_manifest(content: bytes) -> None:
    signed_manifest.check_manifest(TRUST, trust_text.read_signed_manifest(content))


def signed_manifests(folder: Path) -> st.SearchStrategy[bytes]:
    signed = [signed_manifest.sign_manifest(OPERATOR, manifest, None) for manifest in manifests(folder)]
    return st.sampled_from([trust_text.write_signed_manifest(one) for one in signed])


def public_keys(_: Path) -> st.SearchStrategy[bytes]:
    """A device's key, and keys of other kinds."""
    others = (
        ec.generate_private_key(ec.SECP256R1()),
        ed448.Ed448PrivateKey.generate(),
        x25519.X25519PrivateKey.generate(),
    )
    encoding, form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    foreign = [key.public_key().public_bytes(encoding, form) for key in others]
    return st.just(signing_keys.write_public(TRUST.operator_key)) | st.sampled_from(foreign)


def private_keys(_: Path) -> st.SearchStrategy[bytes]:
    own = st.just(signing_keys.write_private(OPERATOR, None))
    return own | st.just(signing_keys.write_private(OPERATOR, b"six random words"))


@cache
def ledger_of_two_runs(folder: Path) -> bytes:
    path = folder / "ledger-of-two-runs.jsonl"
    limits = LifetimeLimits(1000.0, 1e-5)
    units = [PrivacyEvent("example", "local", 2.0, 0.5, 1, 1.0), PrivacyEvent("device", "shared", 3.0, 1.0, 1, 1.0)]
    with DeviceLedger.open(path) as ledger:
        for run_id, events in (("run", units), ("other", units[:1])):
            for round_num in (1, 2):
                ledger.debit(
                    DeviceRelease(run_id, round_num, 0, "ab" * 32, tuple(events), 5, 1, is_seeded=False), limits
                )
    return path.read_bytes()


def ledger_reader(folder: Path) -> Read:
    path = folder / "ledger.jsonl"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        with DeviceLedger.open(path) as ledger:
            ledger.num_participations("run")
            ledger.releases()
            ledger.check_new("run", 3, 0)

    return read


def ledger_parser(name: str, form: Form) -> Parser:
    def seeds(folder: Path) -> st.SearchStrategy[bytes]:
        return st.just(ledger_of_two_runs(folder))

    return Parser(name, ledger_reader, seeds, form, 150, is_foreign=False)


@cache
def enrolled_device(folder: Path) -> Path:
    """A device's folder with something in every file."""
    path = folder / "device"
    certificate = trust.certify(OPERATOR, "anna", operator_keys.create_device(path))
    enrolment.enrol(path, certificate, TRUST.operator_key)
    with enrolment.opened(path) as device:
        device.update(REVOCATIONS)
        device.follow(
            [ROTATION],
            trust.revoke(SUCCESSOR, REVOCATIONS, ()),
            trust.certify(SUCCESSOR, "anna", certificate.device_key),
        )
    signed = signed_manifest.sign_manifest(SUCCESSOR, manifests(folder)[0], REVOCATIONS)
    (path / "manifests" / f"{signed.manifest.hash}.json").write_bytes(trust_text.write_signed_manifest(signed))
    return path


def device_file_parser(pattern: str) -> Parser:
    """A device opens its folder, in which this file is another one."""

    def seeds(folder: Path) -> st.SearchStrategy[bytes]:
        (path,) = enrolled_device(folder).glob(pattern)
        return st.just(path.read_bytes())

    def prepare(folder: Path) -> Read:
        (path,) = enrolled_device(folder).glob(pattern)
        valid = path.read_bytes()

        def read(content: bytes) -> None:
            path.write_bytes(content)
            try:
                with enrolment.opened(enrolled_device(folder)):
                    pass
            finally:
                path.write_bytes(valid)

        return read

    return Parser(
        f"enrolment.opened, {pattern}", prepare, seeds, mutation.JSON_LINE, 60, memory=2**23, is_foreign=False
    )


LIMITS = replace(floors.COMPILED, max_epsilon=100.0, max_target_delta=0.1, allow_no_privacy=True)


# An owner's own file: tomllib takes quadratic memory for a key with thousands of dots.
def config_parser(name: str, load: Callable[[Path, Path], object], seed: Callable[[Path], bytes]) -> Parser:
    def prepare(folder: Path) -> Read:
        path = folder / "config.toml"

        def read(content: bytes) -> None:
            path.write_bytes(content)
            load(path, folder)

        return read

    return Parser(name, prepare, lambda folder: st.just(seed(folder)), mutation.TOML, memory=None, is_foreign=False)


def take_limits(path: Path, folder: Path) -> None:
    """A device's file, and whether what it says can be compared with a manifest."""
    floors.check(manifests(folder)[0], floors.tighten(LIMITS, load_device_config(path).floors))


DEVICE_CONFIG = b"""
[device]
lifetime_epsilon = 8.0
lifetime_delta = 1e-6
[floors]
max_epsilon = 4
min_survivors = 3
allow_server_noise = false
"""


SERVER_CONFIG = b"""
[server]
host = "fl.example.org"
other_hosts = ["10.0.0.1", "fd00::1"]
port = 443
[tls]
certificate = "own.crt"
private_key = "own.key"
[timing]
contribute_s = 60
"""


def file_parser(name: str, read: Read, seeds: Callable[[Path], st.SearchStrategy[bytes]], form: Form) -> Parser:
    return Parser(name, lambda _: read, seeds, form)


def check_floors(content: bytes) -> None:
    floors.check(manifest_file.parse(content), LIMITS)


def agreeable(folder: Path) -> st.SearchStrategy[bytes]:
    for manifest in manifests(folder):
        floors.check(manifest, LIMITS)  # loads the accountant, which takes seconds once
    return canonical(folder)


PARSERS = (
    *map(wire_parser, KINDS),
    Parser("wire.decode_request", lambda _: read_request, lambda _: any_message(*REQUESTS), mutation.MSGPACK),
    *map(device_parser, STAGES),
    *map(server_parser, STAGES),
    file_parser(
        "trust_text.read_certificate", read_certificate,
        lambda _: st.sampled_from([trust_text.write_certificate(one) for one in CERTIFICATES]), mutation.JSON_LINE,
    ),
    file_parser(
        "trust_text.read_revocations", read_revocations, lambda _: st.just(trust_text.write_revocations(REVOCATIONS)),
        mutation.JSON_LINE,
    ),
    file_parser(
        "trust_text.read_rotations", read_rotations, lambda _: st.just(trust_text.write_rotations([ROTATION])),
        mutation.JSON_LINE,
    ),
    file_parser("trust_text.read_signed_manifest", read_signed_manifest, signed_manifests, mutation.JSON_LINE),
    file_parser(
        "device_keys.read", read_device_keys, lambda _: st.just(device_keys.write(DEVICE_KEYS)), mutation.JSON_LINE
    ),
    file_parser(
        "device_keys.read_login", device_keys.read_login,
        lambda _: st.just(device_keys.write_login(device_keys.draw_login())), mutation.PEM,
    ),
    file_parser(
        "server_folder.read_device", read_enrolled_device, lambda _: st.just(roll.write_device(ENROLLED)), mutation.JSON_LINE
    ),
    file_parser("manifest_file.parse", manifest_file.parse, canonical, mutation.JSON),
    Parser("floors.check", lambda _: check_floors, agreeable, mutation.JSON, 100, memory=None),
    file_parser("signing_keys.read_public", signing_keys.read_public, public_keys, mutation.PEM),
    file_parser(
        "signing_keys.read_private", lambda content: signing_keys.read_private(content, None), private_keys, mutation.PEM
    ),
    *map(device_file_parser, ("device.pub", "certificate.json", "rotations.json", "revocations.json", "manifests/*.json")),
    ledger_parser("DeviceLedger.open", mutation.LEDGER),
    ledger_parser("DeviceLedger.open, chained anew", mutation.LEDGER_CHAINED_ANEW),
    config_parser("load_device_config", take_limits, lambda _: DEVICE_CONFIG),
    config_parser("load_server_config", lambda path, _: load_server_config(path), lambda _: SERVER_CONFIG),
    config_parser(
        "load_run_config", lambda path, _: load_run_config(path),
        lambda folder: dump_run_config(tiny_run.config(folder)).encode(),
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.name)
def test_nothing_but_our_errors_comes_of_any_input(parser, folder, fuzz_minutes, record_property):
    valid = Tally()
    attack_with(parser, folder, parser.seeds(folder), 20, valid)
    assert valid.outcomes["accepted"] > 0, "not even what is valid was accepted"
    began = time.monotonic()
    tally = search(parser, folder, fuzz_minutes)
    record_property("fuzzed", (tally.outcomes.total(), time.monotonic() - began, tally.peak))
    assert tally.outcomes.total() > tally.outcomes["accepted"], "nothing was refused"


# What a search like this finds


def a_parser(read: Read, seed: bytes, form: Form) -> Parser:
    return Parser("poor", lambda _: read, lambda _: st.just(seed), form, 2000)


def read_number(content: bytes) -> None:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        raise UpdateError("not JSON") from None
    if type(found["number"]) is not int:
        raise UpdateError("not a number")


def read_anything(content: bytes) -> None:
    try:
        msgpack.unpackb(content, strict_map_key=False, max_array_len=4096)
    except Exception:
        raise UpdateError("not MessagePack") from None


def repeat_input(content: bytes) -> None:
    raise UpdateError(f"expected something else than {content.decode('latin-1')}")


def take_time(content: bytes) -> None:
    began = time.process_time()
    while content[:1] == b"\x91" and time.process_time() - began < SECONDS:
        pass


@pytest.mark.parametrize(
    ("read", "seed", "form", "found"),
    [
        (read_number, b'{"number":1}', mutation.JSON, (KeyError, TypeError, BaseExceptionGroup)),
        (read_anything, b"\x93\x01\x02\x03", mutation.MSGPACK, AssertionError),
        (repeat_input, b"abc", mutation.PEM, AssertionError),
    ],
)
def test_a_poor_parser_is_found(read, seed, form, found, folder):
    with pytest.raises(found):
        search(a_parser(read, seed, form), folder, 0)


# Found once, and tried every time

NESTED = [
    b"\xdc\x10\x00" * 1000,  # lists that each announce 4096 items, in one another: 3 kB took 33 MB
    b"\x93\x01\x01" + b"\xdc\x10\x00" * 1000,
    b"\x93\x01\x01" + b"\xdd\x00\x00\x10\x00" * 1000,
    b"\x93\x01\x01" + b"\x9f" * 1000,
    b"\x93\x01\x01" + b"\x91" * 10**6,
    b"\x93\x01\x01" + b"\xdc\x10\x00" + (b"\x91" * 250 + b"\xc0") * 4000,
    b"\x93\x01\x01" + b"\xdc\x10\x00" + b"\xdc\x00\x96" + b"\x91\x91\x91\xc0" * 150,
]


@pytest.mark.parametrize("content", NESTED, ids=range(len(NESTED)))
def test_lists_in_lists_take_no_more_memory_than_any_other_message(content):
    for read in (
        lambda content: wire.decode(content, KINDS[0], 2**21),
        lambda content: wire.decode_request(content, 2**21),
    ):
        parser = replace(a_parser(read, b"", mutation.MSGPACK), memory=2**17)
        tally = Tally()
        attack(parser, Path(), content, tally)
        assert tally.outcomes["accepted"] == 0 and tally.peak < 2**17 + 2 * len(content)


SETTINGS = {
    "lists in lists": "a = " + "[" * 5000,
    "tables in tables": "a = " + "{a=" * 5000,
    "5000 digits": "[device]\nlifetime_epsilon = " + "1" * 5000,
    "5000 digits in hex": "[device]\nlifetime_epsilon = 0x" + "f" * 5000,
    "more than a float": "[floors]\nmin_survivors = 1" + "0" * 400,
}


@pytest.mark.parametrize("text", SETTINGS.values(), ids=SETTINGS)
def test_a_device_s_file_with_what_python_can_not_hold_is_refused(text, folder):
    path = folder / "device.toml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        load_device_config(path)


@pytest.mark.parametrize("value", ["[" * 5000, "1" * 5000, "0x" + "f" * 5000])
def test_a_value_for_a_setting_that_python_can_not_hold_is_refused(value, folder):
    path = folder / "device.toml"
    path.write_bytes(DEVICE_CONFIG)
    with pytest.raises(ConfigError):
        load_device_config(path, [f"device.lifetime_epsilon={value}"])


def test_a_file_in_the_home_of_nobody_is_refused(folder):
    path = folder / "run.toml"
    path.write_text(dump_run_config(tiny_run.config(folder)).replace('"in memory"', '"~no-such-user/data.jsonl"'))
    with pytest.raises(ConfigError):
        load_run_config(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("unit", []), ("unit", "person"), ("round", None), ("round", -1), ("attempt", "0"), ("run_id", {}), ("state", 1),
        ("z_eff", "2"), ("z_eff", 0), ("z_eff", float("nan")), ("sampling_rate", True), ("num_steps", 1.5), ("seeded", 0),
    ],
)  # fmt: skip
def test_a_device_s_ledger_that_was_chained_anew_around_an_impossible_value_is_refused(name, value, folder):
    # A chain has no key: who can write the file can make one. That ends in our error, not in another one later on.
    entries = mutation.LEDGER_CHAINED_ANEW.load(ledger_of_two_runs(folder))
    changed = [entries[0] | {name: value}, *entries[1:]]
    with pytest.raises(StateError):
        ledger_reader(folder)(mutation.LEDGER_CHAINED_ANEW.dump(changed))
    with pytest.raises(StateError):
        ledger_reader(folder)(mutation.LEDGER_CHAINED_ANEW.dump(changed)[:-10])


# A corrupt device's keys through a whole round


@settings(max_examples=30)
@given(keys_of_a_corrupt_device, keys_of_a_corrupt_device, st.booleans())
def test_whatever_keys_a_corrupt_device_signs_the_others_have_their_sum(mask_key, share_key, drops):
    cohort = Cohort(5)
    identity, digest = cohort.identities["d001"], cohort.context.digest

    def change(stage: Stage, device: str, answer: bytes) -> bytes:
        if (stage, device) != (Stage.ADVERTISE, "d001"):
            return answer
        signature = identity.sign("advert", digest, device, mask_key, share_key)
        advert = replace(decoded(answer, KINDS[1]), mask_key=mask_key, share_key=share_key, signature=signature)
        return wire.encode(advert)

    server = cohort.run(change=change)
    honest = [device for device in cohort.devices if device != "d001"]
    assert {refusal.device for refusal in server.refusals} <= {"d001"} and set(cohort.errors) <= {"d001"}
    np.testing.assert_array_equal(server.cohort_sum.total, cohort.sum_of(honest))
