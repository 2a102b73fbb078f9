"""Whom a round asks, and how often each device has been part of one."""

from collections.abc import Sequence

from fedmini.errors import CohortError
from fedmini.privacy.noise import RandomStream
from fedmini.types import DeviceId, Participation, ReleasePlan, Roster, ServerState


def choose(
    state: ServerState, population: Sequence[DeviceId], release: ReleasePlan, num_wanted: int, stream: RandomStream
) -> tuple[DeviceId, ...]:
    """Whom to ask: uniformly, without replacement, among the devices that may still take part. Claims no amplification.

    Raises CohortError where fewer of them are there than must be left at the end.
    """
    round_num = state.round_num + 1
    eligible = [device for device in sorted(population) if _may_take_part(state, device, release)]
    if len(eligible) < release.min_survivors:
        raise CohortError(
            f"round {round_num}: {len(eligible)} of {len(population)} devices may still take part, "
            f"{release.min_survivors} are needed; nothing was spent"
        )
    return tuple(eligible[index] for index in stream.subset(len(eligible), min(num_wanted, len(eligible))))


def participations(state: ServerState, roster: Roster, *, counted: bool) -> dict[DeviceId, Participation]:
    """Who took part how often, and when last. A lost attempt isn't counted, but its devices remember when it was."""
    after = dict(state.participations)
    for device in roster.devices:
        count = after[device].count if device in after else 0
        after[device] = Participation(count + counted, roster.round_num)
    return after


def _may_take_part(state: ServerState, device: DeviceId, release: ReleasePlan) -> bool:
    past = state.participations.get(device)
    if past is None:
        return True
    since = state.round_num + 1 - past.last_round
    return past.count < release.max_participations and (since >= release.min_separation or since == 0)  # 0: once more
