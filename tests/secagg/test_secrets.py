"""Secrets are gone when they have done their work, and never get into a text, a log or a file."""

import base64
import copy
import gc
import hashlib
import logging
import pickle
import traceback
import types
from collections.abc import Iterator

import numpy as np
import pytest

from fedmini.errors import FedMiniError, ProtocolError
from fedmini.secagg import bindings, device_session
from fedmini.secagg.bindings import Secrets
from fedmini.secagg.device_session import DeviceSession
from fedmini.secagg.messages import Context, Stage
from fedmini.types import DeviceId, Residues
from tests.secagg.cohort import MODEL, Cohort, Device
from tests.secagg.lying_server import believe

OBSERVED = "d000"
NUM_DRAWS = 3 + 2 * 4  # seed, mask key, share key; then the coefficients of two polynomials for a threshold of five


class Known:
    """Random bytes that can be told again from a label, so that nothing needs to keep them."""

    def __init__(self, label: str) -> None:
        self.label, self.count = label, 0

    def __call__(self, size: int) -> bytes:
        self.count += 1
        return draw(self.label, self.count, size)


def draw(label: str, count: int, size: int = 32) -> bytes:
    return hashlib.shake_256(f"{label}/{count}".encode()).digest(size)


def secrets_of(label: str) -> list[bytes]:
    """All that a session draws, as it is used: 255 bits."""
    drawn = (draw(label, count) for count in range(1, NUM_DRAWS + 1))
    return [content[:31] + bytes([content[31] & 0x7F]) for content in drawn]


def observed_cohort() -> tuple[Cohort, DeviceSession, list[bytes]]:
    """Six devices; what one of them draws is known."""
    cohort = Cohort(6)
    identity, agreed = cohort.identities[OBSERVED], cohort.sessions[OBSERVED].agreed
    cohort.sessions[OBSERVED] = DeviceSession(identity, agreed, cohort.owners[OBSERVED], Known("observed"))
    return cohort, cohort.sessions[OBSERVED], secrets_of("observed")


def reachable(root: object) -> Iterator[object]:
    """Everything that can be reached from an object, but for code, and the owner, whose vector it is."""
    seen, waiting = set(), [root]
    while waiting:
        found = waiting.pop()
        is_code = isinstance(found, type | types.ModuleType | types.FunctionType | types.BuiltinFunctionType | Device)
        if id(found) in seen or is_code:
            continue
        seen.add(id(found))
        yield found
        waiting.extend(gc.get_referents(found))


def contents(root: object) -> bytes:
    """All bytes, numbers and texts that can be reached from an object, one after the other."""
    parts = []
    for found in reachable(root):
        if isinstance(found, bytes | bytearray | memoryview):
            parts.append(bytes(found))
        elif isinstance(found, np.ndarray):
            parts.append(found.tobytes())
        elif type(found) is int and found > 2**64:
            parts.append(found.to_bytes(-(-found.bit_length() // 8), "little"))
        elif isinstance(found, str):
            parts.append(found.encode())
    return b"|".join(parts)


def holds(root: object, secrets: list[bytes]) -> bool:
    found = contents(root)
    return any(secret in found for secret in secrets)


def held_shares(session: DeviceSession) -> list[bytes]:
    return [share for pair in session._held.values() for share in pair]


def step_through(cohort: Cohort, last: Stage) -> None:
    """An honest round, until the devices have answered the requests of `last`."""
    server = cohort.server()
    requests = server.invite()
    while server.stage < last:
        requests = server.step(cohort.answers(server.stage, requests))
    list(cohort.answers(last, requests))


def test_before_the_vector_leaves_its_secrets_are_there_to_be_found():
    cohort, session, secrets = observed_cohort()
    step_through(cohort, Stage.SHARE)
    assert all(holds(session, [secret]) for secret in secrets[:3])
    assert not holds(session, secrets[3:])  # the polynomials served once, when they were dealt


def test_when_the_vector_has_left_nothing_that_masked_it_is_reachable():
    cohort, session, secrets = observed_cohort()
    memories = (session._secrets.seed, session._secrets.mask_key._scalar, session._secrets.share_key._scalar)
    step_through(cohort, Stage.CONTRIBUTE)
    assert not holds(session, secrets)
    assert all(memory == bytes(32) for memory in memories)  # overwritten, and not just let go
    assert cohort.owners[OBSERVED].vector.tobytes() not in contents(session)
    assert holds(session, held_shares(session))  # of the others' secrets: these it may have to reveal


def test_twin_without_erasing_the_secrets_outlive_the_vector(monkeypatch):
    monkeypatch.setattr(Secrets, "erase", believe)
    cohort, session, secrets = observed_cohort()
    step_through(cohort, Stage.CONTRIBUTE)
    assert all(holds(session, [secret]) for secret in secrets[:3])


def test_at_the_end_no_share_of_anybody_is_reachable():
    cohort, session, secrets = observed_cohort()
    step_through(cohort, Stage.AGREE)
    shares = held_shares(session)
    assert len(shares) == 12 and holds(session, shares)
    cohort, session, secrets = observed_cohort()
    shares = []
    cohort.run(change=lambda stage, device, answer: (shares.extend(held_shares(session)), answer)[1])
    assert session.stage is Stage.DONE and len(set(shares)) == 12
    assert not holds(session, [*secrets, *shares])


def test_twin_a_session_that_is_not_closed_keeps_the_shares(monkeypatch):
    monkeypatch.setattr(DeviceSession, "close", believe)
    cohort, session, _ = observed_cohort()
    cohort.run()
    assert session.stage is Stage.DONE and holds(session, held_shares(session))


@pytest.mark.parametrize("stage", list(Stage)[:-1], ids=lambda stage: stage.name)
@pytest.mark.parametrize("end", ["a lie", "close"])
def test_after_an_abort_no_secret_is_reachable(stage, end):
    cohort, session, secrets = observed_cohort()
    if stage > Stage.ADVERTISE:
        step_through(cohort, Stage(stage - 1))
    shares = held_shares(session)
    assert holds(session, secrets + shares)
    if end == "close":
        session.close()
    else:
        with pytest.raises(ProtocolError):
            session.step(b"a lie")
    assert session.stage is Stage.DONE and not holds(session, secrets + shares)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, ZeroDivisionError])
def test_after_an_owner_that_fails_no_secret_is_reachable(error):
    def fail(context: Context, model: bytes) -> Residues:
        raise error

    cohort, session, secrets = observed_cohort()
    cohort.owners[OBSERVED].contribute = fail
    with pytest.raises(error):
        step_through(cohort, Stage.CONTRIBUTE)
    assert session.stage is Stage.DONE and not holds(session, secrets) and session._held == {}


def frames_of(error: BaseException) -> list[dict[str, object]]:
    """The local variables of the library's frames that an error and what led to it hold on to."""
    found: list[dict[str, object]] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is not None:
            waiting += [one.__cause__, one.__context__]
            frames = [frame for frame, _ in traceback.walk_tb(one.__traceback__)]
            found += [dict(frame.f_locals) for frame in frames if "fedmini/secagg" in frame.f_code.co_filename]
    return found


def error_of_a_share_that_is_not_as_committed(monkeypatch: pytest.MonkeyPatch) -> tuple[ProtocolError, list[bytes]]:
    """The observed device opens a peer's shares, and finds another commitment beside them."""
    cohort, session, secrets = observed_cohort()
    monkeypatch.setattr(bindings, "commit_shares", lambda *of: bytes(64) if of[2] == OBSERVED else b"\x01" * 64)
    server = cohort.server()
    requests = server.invite()
    for stage in (Stage.ADVERTISE, Stage.SHARE):
        requests = server.step(cohort.answers(stage, requests))
    work = dict(requests)[OBSERVED]
    monkeypatch.setattr(bindings, "commit_shares", lambda *of: b"\x02" * 64)
    with pytest.raises(ProtocolError, match="other shares than it committed to") as caught:
        session.step(work)
    return caught.value, secrets


def test_an_error_holds_on_to_no_secret_in_the_frames_it_came_through(monkeypatch):
    error, secrets = error_of_a_share_that_is_not_as_committed(monkeypatch)
    kept = [value for frame in frames_of(error) for value in frame.values() if not isinstance(value, BaseException)]
    assert not holds(kept, secrets)
    assert not any("pair" in frame or "content" in frame for frame in frames_of(error)), "a peer's shares"


def test_twin_with_its_frames_an_error_carries_a_peers_shares_to_whoever_reports_it(monkeypatch):
    monkeypatch.setattr(device_session, "_without_frames", believe_it)
    error, _ = error_of_a_share_that_is_not_as_committed(monkeypatch)
    assert any("pair" in frame for frame in frames_of(error))


def believe_it(error: FedMiniError) -> FedMiniError:
    return error


def texts_of(secret: bytes) -> list[str]:
    """How a secret can stand in a text."""
    number = [str(int.from_bytes(secret, order)) for order in ("little", "big")]
    return [secret.hex(), base64.b64encode(secret).decode(), repr(secret)[2:-1], str(list(secret))[1:-1], *number]


def says(text: str, secrets: list[bytes]) -> bool:
    return any(form in text or form.upper() in text for secret in secrets for form in texts_of(secret))


def test_a_secret_that_stands_in_a_text_would_be_found():
    secret = draw("any", 1)
    for text in (f"{secret!r}", f"{bytearray(secret)}", secret.hex(), f"{list(secret)}", f"{int.from_bytes(secret)}"):
        assert says(f"it is {text}.", [secret])


def test_no_text_of_a_session_says_a_secret(caplog):
    """Its repr and str, with all that it is made of, at every stage; and whatever is logged on the way."""
    caplog.set_level(logging.DEBUG)
    cohort, session, secrets = observed_cohort()
    texts: list[str] = []

    def listen(stage: Stage, device: DeviceId, answer: bytes) -> bytes:
        inside = [getattr(session, name) for name in session.__slots__ if name != "_held"]  # a dict of bytes
        for part in (session, server, server._opening, *inside):
            texts.extend((repr(part), str(part), f"{part}"))
        shares.extend(held_shares(session))
        return answer

    shares: list[bytes] = []
    server = cohort.server()
    cohort.run(change=listen, server=server)
    assert shares and not says("\n".join([*texts, caplog.text]), secrets + shares)


@pytest.mark.parametrize("stage", list(Stage)[1:-1], ids=lambda stage: stage.name)
def test_no_error_of_a_session_says_a_secret(stage, caplog):
    """Every request of this stage, changed in each of its bytes in turn, which ends the session in many ways."""
    caplog.set_level(logging.DEBUG)
    texts, said = [], set()
    for place in range(0, 400, 13):
        cohort, session, secrets = observed_cohort()
        shares: list[bytes] = []

        def tamper(at: Stage, device: DeviceId, request: bytes, place: int = place) -> bytes:
            if (at, device) != (stage, OBSERVED):
                return request
            shares.extend(held_shares(session))  # noqa: B023
            place = place % len(request)
            return request[:place] + bytes([request[place] ^ 1]) + request[place + 1 :]

        try:
            cohort.run(tamper=tamper)
        except FedMiniError as error:
            texts += traceback.format_exception(error)
        if OBSERVED in cohort.errors:
            texts += traceback.format_exception(cohort.errors[OBSERVED])
            texts.append(repr(cohort.errors[OBSERVED].args))
            said.add(str(cohort.errors[OBSERVED]))
        assert not says("\n".join([*texts, caplog.text]), secrets + shares)
    assert len(said) >= 2


@pytest.mark.parametrize("stage", list(Stage)[:-1], ids=lambda stage: stage.name)
def test_a_session_is_not_copied_nor_serialised_at_any_stage(stage):
    cohort, session, _ = observed_cohort()
    server = cohort.server()
    requests = server.invite()
    while server.stage < stage:
        requests = server.step(cohort.answers(server.stage, requests))
    list(cohort.answers(stage, requests))
    secrets = [session, session._secrets, session._secrets.mask_key, session._secrets.share_key, server]
    for secret in (*secrets, [session], {"session": session}):
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            with pytest.raises(TypeError):
                pickle.dumps(secret, protocol)
        with pytest.raises(TypeError):
            copy.deepcopy(secret)
    for secret in secrets:
        with pytest.raises(TypeError, match="serialised"):
            copy.copy(secret)
    assert not any(hasattr(secret, "__dict__") for secret in secrets[:4])  # nothing that asks for one gets a copy


def test_what_was_contributed_is_asked_for_once_and_kept_by_its_owner_alone():
    cohort, session, _ = observed_cohort()
    cohort.run()
    assert cohort.owners[OBSERVED].models == [MODEL]
    assert cohort.owners[OBSERVED].vector.tobytes() not in contents(session)
