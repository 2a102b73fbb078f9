"""Any `threshold` shares give the secret, and fewer say nothing about it."""

import itertools
import os
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedmini.errors import CohortError, ConfigError
from fedmini.secagg import shamir
from fedmini.secagg.shamir import PRIME, SHARE_BYTES

elements = st.integers(0, PRIME - 1) | st.sampled_from([0, 1, PRIME - 1])
seeds = st.integers(0, 2**32)


@st.composite
def splits(draw, least_threshold: int = 1) -> tuple[int, int, list[int]]:
    """A threshold, a number of holders, and some of their indices, in any order."""
    threshold = draw(st.integers(least_threshold, 12))
    num_holders = draw(st.integers(threshold, 20))
    return threshold, num_holders, draw(st.permutations(range(1, num_holders + 1)))


def stream(seed: int) -> shamir.Random:
    return random.Random(seed).randbytes


def encoded(value: int) -> bytes:
    return value.to_bytes(SHARE_BYTES, "little")


def held(shares: list[bytes], indices: list[int]) -> dict[int, bytes]:
    """The shares of the holders at these indices."""
    return {index: shares[index - 1] for index in indices}


def combine(shares: dict[int, bytes]) -> bytes:
    return bytes(shamir.combine(shares, shamir.weights(tuple(shares))))


@given(elements, splits(), seeds)
def test_any_threshold_of_the_shares_gives_the_secret(secret, split, seed):
    threshold, num_holders, order = split
    shares = shamir.split(encoded(secret), num_holders, threshold, stream(seed))
    assert combine(held(shares, order[:threshold])) == encoded(secret)


@given(elements, splits(), seeds, st.data())
def test_more_shares_than_the_threshold_give_the_same_secret(secret, split, seed, data):
    threshold, num_holders, order = split
    shares = shamir.split(encoded(secret), num_holders, threshold, stream(seed))
    num_shares = data.draw(st.integers(threshold, num_holders))
    assert combine(held(shares, order[:num_shares])) == encoded(secret)


def test_every_threshold_of_five_shares_gives_the_secret_and_no_pair_does():
    secret = bytes(shamir.random_secret(os.urandom))
    shares = shamir.split(secret, 5, 3, os.urandom)
    for indices in itertools.combinations(range(1, 6), 3):
        assert combine(held(shares, list(indices))) == secret
    for indices in itertools.combinations(range(1, 6), 2):
        assert combine(held(shares, list(indices))) != secret


def test_a_split_is_a_polynomial_that_can_be_checked_by_hand():
    # 7 + 2 x + 3 x**2, the coefficients drawn highest first: 12, 23, 40 at 1, 2, 3.
    coefficients = iter([encoded(3), encoded(2)])
    shares = shamir.split(encoded(7), 3, 3, lambda size: next(coefficients))
    assert shares == [encoded(12), encoded(23), encoded(40)]
    # And back: Lagrange's coefficients at 0 for 1, 2, 3 are 3, -3, 1.
    assert shamir.weights((1, 2, 3)) == {1: 3, 2: PRIME - 3, 3: 1}
    assert combine(held(shares, [1, 2, 3])) == encoded(7)  # 36 - 69 + 40


@given(splits(), seeds)
def test_with_threshold_one_every_share_is_the_secret(split, seed):
    _, num_holders, _ = split
    secret = bytes(shamir.random_secret(stream(seed)))
    assert shamir.split(secret, num_holders, 1, stream(seed)) == [secret] * num_holders


@given(elements, elements, splits(least_threshold=2), seeds)
def test_one_share_less_than_the_threshold_is_consistent_with_every_secret(secret, other, split, seed):
    # Whatever the secret, there is a missing share with which those that are there give it: so they say nothing of it.
    threshold, num_holders, order = split
    seen, missing = order[: threshold - 1], order[threshold - 1]
    shares = held(shamir.split(encoded(secret), num_holders, threshold, stream(seed)), seen)
    weights = shamir.weights((*seen, missing))
    known = sum(weights[index] * int.from_bytes(share, "little") for index, share in shares.items())
    fitting = (other - known) * pow(weights[missing], -1, PRIME) % PRIME
    assert combine({**shares, missing: encoded(fitting)}) == encoded(other)


@pytest.mark.parametrize("secret", [0, 1, PRIME - 1])
def test_a_share_of_any_secret_is_uniform(secret):
    # Four of its bytes, over 20,000 splits, in 64 bins each.
    draw = stream(secret % 1000)
    rows = [shamir.split(encoded(secret), 3, 2, draw)[index % 3] for index in range(20_000)]
    values = np.frombuffer(bytearray().join(rows), np.uint8).reshape(-1, SHARE_BYTES)
    values[:, 31] *= 2  # an element has 255 bits: seven in its last byte
    for place in (0, 1, 16, 31):
        assert stats.chisquare(np.bincount(values[:, place] // 4, minlength=64)).pvalue > 1e-5


def test_twin_a_share_with_a_small_coefficient_is_not_uniform():
    values = [shamir.split(encoded(0), 3, 2, lambda size: os.urandom(31) + b"\0")[0][31] for _ in range(2000)]
    assert stats.chisquare(np.bincount(np.array(values) // 2, minlength=64)).pvalue < 1e-5


def test_two_splits_of_one_secret_share_nothing():
    secret = bytes(shamir.random_secret(os.urandom))
    first, second = (shamir.split(secret, 150, 101, os.urandom) for _ in range(2))
    assert set(first).isdisjoint(second)
    # And a share of the one with the others of the other gives neither.
    assert combine(held(first, list(range(1, 101))) | {101: second[100]}) != secret


@given(elements, splits(least_threshold=2), seeds, st.integers(1, PRIME - 1), st.data())
def test_one_wrong_share_gives_a_wrong_secret(secret, split, seed, error, data):
    threshold, num_holders, order = split
    shares = held(shamir.split(encoded(secret), num_holders, threshold, stream(seed)), order[:threshold])
    wrong = data.draw(st.sampled_from(sorted(shares)))
    shares[wrong] = encoded((int.from_bytes(shares[wrong], "little") + error) % PRIME)
    assert combine(shares) != encoded(secret)


@given(elements, splits(least_threshold=2), seeds)
def test_shares_that_change_places_give_a_wrong_secret(secret, split, seed):
    threshold, num_holders, order = split
    shares = held(shamir.split(encoded(secret), num_holders, threshold, stream(seed)), order[:threshold])
    first, second = order[:2]
    weights = shamir.weights(tuple(shares))
    swapped = {**shares, first: shares[second], second: shares[first]}
    # Of 12 holders at 1 to 12, those at 5 and 7 have the same coefficient, 12 over 5: as if nothing had been changed.
    assert (combine(swapped) == encoded(secret)) == (weights[first] == weights[second])


def test_a_hundred_and_fifty_holders_are_no_trouble():
    secret = bytes(shamir.random_secret(os.urandom))
    shares = shamir.split(secret, 150, 101, os.urandom)
    assert len(shares) == len(set(shares)) == 150
    assert combine(held(shares, list(range(50, 151)))) == secret
    assert combine(held(shares, list(range(51, 151)))) != secret


def test_shares_that_the_coefficients_do_not_name_are_not_used():
    shares = shamir.split(encoded(5), 4, 2, os.urandom)
    found = held(shares, [1, 2]) | {3: b"nonsense"}
    assert shamir.combine(found, shamir.weights((1, 2))) == encoded(5)


def test_one_set_of_coefficients_serves_every_secret():
    weights = shamir.weights((2, 4, 5))
    for secret in (0, 1, PRIME - 1):
        shares = shamir.split(encoded(secret), 5, 3, os.urandom)
        assert shamir.combine(held(shares, [2, 4, 5]), weights) == encoded(secret)


def test_a_missing_share_is_named():
    shares = shamir.split(encoded(5), 4, 3, os.urandom)
    with pytest.raises(CohortError, match="the share at index 4 is missing"):
        shamir.combine(held(shares, [1, 2]), shamir.weights((1, 2, 4)))


@pytest.mark.parametrize(("num_holders", "threshold"), [(3, 0), (3, -1), (3, 4), (0, 1), (0, 0)])
def test_a_threshold_that_no_holders_can_reach_is_refused(num_holders, threshold):
    with pytest.raises(ConfigError, match=f"between 1 and the {num_holders} holders, got {threshold}"):
        shamir.split(encoded(5), num_holders, threshold, os.urandom)


@pytest.mark.parametrize("secret", [PRIME, PRIME + 1, 2**256 - 1])
def test_a_secret_outside_of_the_field_is_refused_and_not_shown(secret):
    with pytest.raises(ConfigError, match="below 2") as refused:
        shamir.split(encoded(secret), 3, 2, os.urandom)
    assert str(secret) not in str(refused.value) and encoded(secret).hex() not in str(refused.value)


@pytest.mark.parametrize("indices", [(1, 1), (0, 1), (-1, 2), (1, PRIME), (1, PRIME + 1)])
def test_indices_that_are_not_each_holder_s_own_are_refused(indices):
    # PRIME stands for 0, where the secret is, and PRIME + 1 for 1 once more.
    with pytest.raises(ConfigError, match="an index of its own"):
        shamir.weights(indices)


@given(st.binary(max_size=40) | st.integers(0, 2**256 - 1).map(encoded))
def test_a_share_is_an_element_in_its_one_form(content):
    expected = len(content) == SHARE_BYTES and int.from_bytes(content, "little") < PRIME
    assert shamir.is_share(content) == expected


def test_the_first_number_outside_of_the_field_is_no_share():
    assert shamir.is_share(encoded(PRIME - 1))
    assert not shamir.is_share(encoded(PRIME))
    assert not shamir.is_share(encoded(0) + b"\0")
    assert not shamir.is_share(encoded(0)[:-1])


@given(elements, splits(), seeds)
def test_every_share_is_one(secret, split, seed):
    threshold, num_holders, _ = split
    assert all(map(shamir.is_share, shamir.split(encoded(secret), num_holders, threshold, stream(seed))))


@settings(max_examples=50)
@given(seeds)
def test_a_random_secret_is_an_element_that_can_be_erased(seed):
    secret = shamir.random_secret(stream(seed))
    assert isinstance(secret, bytearray)
    assert shamir.is_share(bytes(secret))


def test_a_draw_outside_of_the_field_is_drawn_again():
    # 2**255 - 1 and 2**255 - 19 are outside; the top bit is not looked at.
    draws = iter([encoded(2**255 - 1), encoded(PRIME), encoded(2**255 + PRIME), encoded(2**255 + 7)])
    assert shamir.random_secret(lambda size: next(draws)) == encoded(7)
    assert next(draws, None) is None
