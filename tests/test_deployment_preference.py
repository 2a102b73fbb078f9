"""Whom a round asks: no device, whatever it says and of whom, keeps honest ones from meeting."""

from hypothesis import given
from hypothesis import strategies as st

from fedmini.deployment.preference import Preference

HONEST = tuple(f"honest-{number}" for number in range(8))
HOSTILE = ("evil-0", "evil-1")
EVERYBODY = (*HONEST, *HOSTILE)
LIES = st.lists(st.tuples(st.sampled_from(HOSTILE), st.sampled_from(EVERYBODY), st.booleans()), max_size=40)


@given(lies=LIES)
def test_hostile_devices_never_keep_two_honest_ones_apart(lies: list[tuple[str, str, bool]]) -> None:
    """Whoever blames whom, one of the two is hostile; each hostile device costs at most one honest one its place."""
    preference = Preference()
    for hostile, other, is_blamed in lies:
        preference.blamed(*((other, hostile) if is_blamed else (hostile, other)))
    chosen = preference.choose(EVERYBODY, len(EVERYBODY))
    assert len(set(HONEST) - set(chosen)) <= len(HOSTILE)
    assert all(frozenset((one, other)) not in preference._apart for one in chosen for other in chosen)


def test_a_device_that_deals_badly_to_two_or_blames_two_is_left_out() -> None:
    for pairs in ([("honest-0", "evil-0"), ("honest-1", "evil-0")], [("evil-0", "honest-0"), ("evil-0", "honest-1")]):
        preference = Preference()
        for holder, dealer in pairs:
            preference.blamed(holder, dealer)
        assert preference.choose((*HONEST, "evil-0"), 9) == HONEST


def test_twin_without_a_memory_the_same_device_is_asked_every_time() -> None:
    assert Preference().choose((*HONEST, "evil-0"), 9) == tuple(sorted((*HONEST, "evil-0")))


def test_who_left_a_paid_round_is_asked_only_where_there_are_too_few_others() -> None:
    preference = Preference()
    preference.left("honest-3")
    preference.left("honest-3")
    preference.left("honest-5")
    assert preference.choose(HONEST, 8) == HONEST
    assert "honest-3" not in preference.choose(HONEST, 7) and "honest-5" in preference.choose(HONEST, 7)
    assert set(HONEST) - set(preference.choose(HONEST, 4)) == {"honest-3", "honest-5"}, "nobody else is left out"
    preference.stayed("honest-3")
    assert set(HONEST) - set(preference.choose(HONEST, 4)) == {"honest-5"}


def test_a_device_that_blames_itself_is_not_believed() -> None:
    preference = Preference()
    preference.blamed("honest-0", "honest-0")
    assert preference.choose(HONEST, 8) == HONEST
