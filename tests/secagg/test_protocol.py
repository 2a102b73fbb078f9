"""The protocol without enemies: the sum of whoever survived, exactly, or a clean end."""

import tracemalloc

import numpy as np
import pytest

from fedmini.secagg.messages import Stage
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
