"""The protocol without enemies: the sum of whoever survived, exactly, or a clean end."""

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
