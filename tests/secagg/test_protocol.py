"""The protocol without enemies: the sum of whoever survived, exactly, or a clean end."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from fedmini.errors import CohortError
from fedmini.secagg import wire
from fedmini.secagg.messages import KeyList, Stage, Work
from fedmini.types import DeviceId
from tests.secagg.cohort import Cohort, a_manifest


@pytest.mark.parametrize("num_devices", [2, 3, 7])
@pytest.mark.parametrize("modulus_bits", [24, 32])
def test_the_sum_of_everybody_comes_out_exactly(num_devices: int, modulus_bits: int) -> None:
    cohort = Cohort(num_devices, a_manifest(modulus_bits=modulus_bits))
    server = cohort.run()
    assert server.refusals == [] and cohort.errors == {}
    assert server.cohort_sum.num_devices == num_devices
    np.testing.assert_array_equal(server.cohort_sum.total, cohort.sum_of(cohort.devices))


def test_devices_that_drop_before_they_contribute_are_not_in_the_sum() -> None:
    cohort = Cohort(7)
    server = cohort.run(drop={Stage.CONTRIBUTE: ("d001", "d005")})
    left = [device for device in cohort.devices if device not in ("d001", "d005")]
    np.testing.assert_array_equal(server.cohort_sum.total, cohort.sum_of(left))


def peak_bytes(num_devices: int, *, collected: bool) -> int:
    """Peak memory while vectors of 200,000 coordinates come in, from devices that all hold the same one."""
    cohort = Cohort(num_devices, a_manifest(num_coordinates=200_000))
    for owner in cohort.owners.values():
        owner.vector = cohort.owners["d000"].vector
    server = cohort.server()
    requests = server.invite()
    for stage in (Stage.ADVERTISE, Stage.SHARE):
        requests = server.step(cohort.answers(stage, requests))
    tracemalloc.start()
    try:
        answers = cohort.answers(Stage.CONTRIBUTE, requests)
        server.step(list(answers) if collected else answers)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_the_server_s_memory_for_vectors_does_not_grow_with_the_cohort() -> None:
    """Thirty more vectors would be 18 MB."""
    assert peak_bytes(40, collected=False) - peak_bytes(10, collected=False) < 2 * 2**20


def test_twin_a_server_that_collects_its_answers_first_grows_by_a_vector_for_each_device() -> None:
    assert peak_bytes(40, collected=True) - peak_bytes(10, collected=True) > 15 * 2**20


@pytest.mark.parametrize("stage", [Stage.SHARE, Stage.CONTRIBUTE, Stage.AGREE, Stage.UNMASK])
def test_a_request_of_another_session_is_refused_at_every_stage(stage: Stage) -> None:
    cohort = Cohort(5)

    def tamper(at: Stage, device: DeviceId, request: bytes) -> bytes:
        if at is not stage:
            return request
        return wire.encode(replace(wire.decode_request(request, 2**20), session=b"\x01" * 32))

    with pytest.raises(CohortError):
        cohort.run(tamper=tamper)
    assert set(cohort.errors) == set(cohort.devices)
    assert all("another session" in str(error) for error in cohort.errors.values())


def test_shares_of_fewer_than_the_threshold_are_no_reason_to_contribute() -> None:
    """Two survivors would be enough for the noise; but of twelve devices nine must stay for the sum to be opened."""
    cohort = Cohort(12, a_manifest(min_survivors=2))

    def tamper(at: Stage, device: DeviceId, request: bytes) -> bytes:
        if at is not Stage.CONTRIBUTE:
            return request
        work = wire.decode(request, Work, 2**20)
        return wire.encode(replace(work, shares=work.shares[:7]))

    with pytest.raises(CohortError):
        cohort.run(tamper=tamper)
    assert all("expected at least 9 devices that hold shares, got 8" in str(error) for error in cohort.errors.values())
    assert len(cohort.errors) == 12 and not any(owner.models for owner in cohort.owners.values())


def test_the_name_of_a_list_of_keys_changes_with_everything_that_is_on_it() -> None:
    cohort = Cohort(3)
    server = cohort.server()
    _, content = next(server.step(cohort.answers(Stage.ADVERTISE, server.invite())))
    found = wire.decode(content, KeyList, 2**20)
    first, *others = found.adverts
    stranger = replace(first.certificate, device_key=b"\x01" * 32)
    changed = [
        replace(first, sender="another"),
        replace(first, mask_key=b"\x01" * 32),
        replace(first, share_key=b"\x01" * 32),
        replace(first, certificate=stranger),
    ]
    lists = [replace(found, adverts=(advert, *others)) for advert in changed]
    lists += [replace(found, threshold=2), replace(found, session=b"\x01" * 32), replace(found, adverts=tuple(others))]
    assert len({found.digest, *(one.digest for one in lists)}) == 1 + len(lists)
