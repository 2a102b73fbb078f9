"""Whoever drops, and whenever: the exact sum of those whose vectors came in time, or a clean end, and nothing else."""

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmini.errors import CohortError
from fedmini.secagg import wire
from fedmini.secagg.checks import lowest_threshold
from fedmini.secagg.messages import KeyList, Stage
from fedmini.secagg.server_session import ServerSession
from fedmini.types import DeviceId
from tests.secagg.cohort import Cohort, a_manifest

STAGES = list(Stage)[:-1]
Drops = Mapping[Stage, Sequence[DeviceId]]


class WithThreshold(ServerSession):
    """A server that sets a threshold of its own, and keeps to it."""

    threshold: int

    def step(self, answers):
        if self.stage is not Stage.ADVERTISE:
            return super().step(answers)
        ((device, request), *others) = super().step(answers)
        lie = KeyList(**fields_of(wire.decode(request, KeyList, 2**20)) | {"threshold": self.threshold})
        self._threshold, self._digest = lie.threshold, lie.digest
        return iter([(device, wire.encode(lie)) for device in (device, *(name for name, _ in others))])


def fields_of(key_list: KeyList) -> dict[str, object]:
    return {name: getattr(key_list, name) for name in KeyList.__slots__}


def expected_survivors(cohort: Cohort, drops: Drops, threshold: int | None) -> list[DeviceId] | None:
    """Who is in the sum, by the rules of the protocol alone; None where too few are left at some stage."""
    left = {Stage.ADVERTISE: [device for device in cohort.devices if device not in drops[Stage.ADVERTISE]]}
    for before, stage in itertools.pairwise(STAGES):
        left[stage] = [device for device in left[before] if device not in drops[stage]]
    num_keys = len(left[Stage.ADVERTISE])
    threshold = lowest_threshold(num_keys) if threshold is None else threshold
    if not lowest_threshold(num_keys) <= threshold <= num_keys:
        return None
    least = max(threshold, cohort.manifest.release.min_survivors)
    needed = dict(zip(STAGES, (least, least, least, threshold, threshold), strict=True))
    is_enough = all(len(left[stage]) >= needed[stage] for stage in STAGES)
    return left[Stage.CONTRIBUTE] if is_enough else None


@st.composite
def cohorts(draw):
    """Who takes part, how many must survive, and who drops before which stage."""
    num_devices = draw(st.integers(1, 12))
    manifest = a_manifest(
        num_coordinates=draw(st.integers(6, 30)),
        min_survivors=draw(st.just(1) | st.integers(1, num_devices)),
        modulus_bits=draw(st.sampled_from([24, 32])),
    )
    names = st.lists(st.sampled_from([f"d{place:03d}" for place in range(num_devices)]), max_size=2, unique=True)
    is_dropping = st.booleans()  # most rounds with drops at every stage would come to nothing
    drops = {stage: draw(names) if draw(is_dropping) else [] for stage in STAGES}
    return num_devices, manifest, drops


@settings(max_examples=120)
@given(cohorts())
def test_the_exact_sum_of_the_survivors_comes_out_or_a_clean_end(drawn):
    num_devices, manifest, drops = drawn
    cohort = Cohort(num_devices, manifest)
    ends_as_it_should(cohort, cohort.server(), drops, threshold=None)


@settings(max_examples=80)
@given(cohorts(), st.integers(-4, 4))
def test_with_any_threshold_too_the_exact_sum_of_the_survivors_comes_out_or_a_clean_end(drawn, more):
    """From four less than devices accept to four more: more than there are devices as well."""
    num_devices, manifest, drops = drawn
    num_keys = num_devices - len(drops[Stage.ADVERTISE])
    threshold = max(1, lowest_threshold(num_keys) + more)
    cohort = Cohort(num_devices, manifest)
    server = WithThreshold(manifest, cohort.context, cohort.server()._model, cohort.trust)
    server.threshold = threshold
    ends_as_it_should(cohort, server, drops, threshold)


def ends_as_it_should(cohort: Cohort, server: ServerSession, drops: Drops, threshold: int | None) -> None:
    survivors = expected_survivors(cohort, drops, threshold)
    if survivors is None:
        with pytest.raises(CohortError):
            cohort.run(drop=drops, server=server)
        assert server.stage is not Stage.DONE
        return
    cohort.run(drop=drops, server=server)
    assert server.refusals == [] and cohort.errors == {}
    assert server.cohort_sum.num_devices == len(survivors)
    np.testing.assert_array_equal(server.cohort_sum.total, cohort.sum_of(survivors))


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_thirty_percent_may_drop_before_any_one_stage(stage):
    """Of 31 devices 9 drop, 22 are left, and 21 are needed."""
    cohort = Cohort(31, a_manifest(min_survivors=20))
    gone = cohort.devices[4:13]
    assert len(gone) == math.floor(0.3 * 31)
    server = cohort.run(drop={stage: gone})
    left = [device for device in cohort.devices if device not in gone or stage > Stage.CONTRIBUTE]
    np.testing.assert_array_equal(server.cohort_sum.total, cohort.sum_of(left))
    assert server.cohort_sum.num_devices == len(left)


def test_where_thirty_percent_drop_before_every_stage_the_round_ends_before_anything_is_revealed():
    cohort = Cohort(40)
    left, drop = list(cohort.devices), {}
    for stage in STAGES:
        drop[stage] = left[: math.floor(0.3 * len(left))]
        left = left[len(drop[stage]) :]
    server = cohort.server()
    with pytest.raises(CohortError, match="14 devices sent their vectors, 19 are needed; what was debited stays spent"):
        cohort.run(drop=drop, server=server)
    assert all(cohort.sessions[device].stage < Stage.UNMASK for device in left)


@settings(max_examples=25)
@given(st.permutations(range(6)), st.integers(0, 5))
def test_the_order_in_which_answers_come_and_come_again_changes_nothing(order, again):
    cohort = Cohort(6)
    server = cohort.server()
    requests = server.invite()
    while server.stage is not Stage.DONE:
        answers = sorted(cohort.answers(server.stage, requests), key=lambda answer: order[int(answer[0][1:])])
        requests = server.step(iter([*answers, answers[again]]))
    assert server.refusals == []
    np.testing.assert_array_equal(server.cohort_sum.total, cohort.sum_of(cohort.devices))
