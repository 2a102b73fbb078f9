import functools
import itertools
import math
import pickle
import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedmini.errors import CohortError, ConfigError
from fedmini.privacy import noise
from fedmini.privacy.noise import RandomStream, discrete_gaussian


def exact_mass(variance: int) -> tuple[np.ndarray, np.ndarray]:
    reach = 12 * math.isqrt(variance) + 12
    support = np.arange(-reach, reach + 1)
    weights = np.exp(-(support.astype(float) ** 2) / (2 * variance))
    return support, weights / weights.sum()


def chi_square_p_value(drawn: np.ndarray, support: np.ndarray, mass: np.ndarray, num_bins: int) -> float:
    """Of the draws against the exact mass, in bins of about equal probability."""
    bins = np.minimum((np.cumsum(mass) * num_bins).astype(int), num_bins - 1)
    expected = np.bincount(bins, mass, num_bins) * drawn.size
    observed = np.bincount(bins[drawn - support[0]], minlength=num_bins)
    used = expected > 5
    expected, observed = expected[used], observed[used]
    return float(stats.chisquare(observed, expected * (observed.sum() / expected.sum())).pvalue)


@pytest.mark.parametrize("variance", [1, 2, 9, 256, 257, 10_007, 2556**2, 21_000**2])
def test_draws_follow_the_exact_mass_function(variance):
    drawn = discrete_gaussian(variance, 400_000, RandomStream.seeded(variance, "chi-square"))
    support, mass = exact_mass(variance)
    assert drawn.dtype == np.int64
    assert chi_square_p_value(drawn, support, mass, 64) > 1e-4
    assert chi_square_p_value(-drawn, support, mass, 64) > 1e-4


def test_the_chi_square_test_catches_a_variance_that_is_three_percent_off():
    drawn = discrete_gaussian(2652, 400_000, RandomStream.seeded(0))
    assert chi_square_p_value(drawn, *exact_mass(2576), 64) < 1e-4


@pytest.mark.parametrize("variance", [256, (2**14 * 64) ** 2, noise.MAX_VARIANCE])
def test_mean_variance_and_symmetry_are_right_up_to_the_largest_variance(variance):
    drawn = discrete_gaussian(variance, 400_000, RandomStream.seeded(variance, "moments")) / math.sqrt(variance)
    error = 1 / math.sqrt(drawn.size)
    assert abs(drawn.mean()) < 5 * error
    assert abs(drawn.var() - 1) < 5 * math.sqrt(2) * error
    assert abs((drawn > 0).mean() - (drawn < 0).mean()) < 5 * error
    assert abs(stats.kurtosis(drawn)) < 5 * math.sqrt(24) * error


def test_large_draws_use_every_integer_within_a_block():
    """A block of a large variance holds thousands of integers: the lowest bits are uniform."""
    drawn = discrete_gaussian((2**14 * 64) ** 2, 256_000, RandomStream.seeded(3))
    counts = np.bincount(drawn & 255, minlength=256)
    assert stats.chisquare(counts).pvalue > 1e-4


# An independent implementation, slow and in exact fractions: Canonne, Kamath, Steinke, arXiv:2004.00010, Algorithms 1-3.
def bernoulli_exp(exponent: Fraction, source: random.Random) -> bool:
    while exponent > 1:
        if not bernoulli_exp(Fraction(1), source):
            return False
        exponent -= 1
    for k in itertools.count(1):
        chance = exponent / k
        if source.randrange(chance.denominator) >= chance.numerator:
            return k % 2 == 1
    raise AssertionError


def plain_discrete_gaussian(variance: int, source: random.Random) -> int:
    width = math.isqrt(variance) + 1
    while True:
        low = source.randrange(width)
        if not bernoulli_exp(Fraction(low, width), source):
            continue
        high = 0
        while bernoulli_exp(Fraction(1), source):
            high += 1
        magnitude, negative = low + width * high, source.randrange(2) == 1
        if negative and magnitude == 0:
            continue
        distance = abs(magnitude - Fraction(variance, width))
        if bernoulli_exp(distance**2 / (2 * variance), source):
            return -magnitude if negative else magnitude


@pytest.mark.parametrize("variance", [5, 300])
def test_draws_agree_with_an_independent_exact_implementation(variance):
    source = random.Random(variance)
    theirs = np.array([plain_discrete_gaussian(variance, source) for _ in range(6000)])
    ours = discrete_gaussian(variance, 200_000, RandomStream.seeded(variance, "independent"))
    edges = np.unique(np.quantile(ours, np.linspace(0, 1, 17)[1:-1]))
    table = np.stack([np.bincount(np.digitize(x, edges), minlength=edges.size + 1) for x in (ours, theirs)])
    assert stats.chi2_contingency(table).pvalue > 1e-4


@functools.cache
def opendp_discrete_gaussian(variance: int) -> np.ndarray:
    """OpenDP's sampler, on the operating system's randomness: it takes no seed."""
    import opendp.prelude as dp

    dp.enable_features("contrib")
    space = dp.vector_domain(dp.atom_domain(T=dp.i64)), dp.l2_distance(T=dp.f64)
    return np.array(dp.m.make_gaussian(*space, scale=math.sqrt(variance))([0] * 50_000))


def same_law_p_value(first: np.ndarray, second: np.ndarray, num_bins: int = 16) -> float:
    """A two-sample chi-square's, in bins that hold about equally many of both together."""
    edges = np.unique(np.quantile(np.concatenate([first, second]), np.linspace(0, 1, num_bins + 1)[1:-1]))
    table = [np.bincount(np.digitize(draws, edges), minlength=edges.size + 1) for draws in (first, second)]
    return float(stats.chi2_contingency(table, correction=False).pvalue)


# OpenDP draws anew in every run: so rarely is a comparison wrong by chance, and so rarely misses a tenth of the variance.
OPENDP_FALSE_ALARM = 1e-7


@pytest.mark.parametrize("variance", [20, 300, 2556**2])
def test_draws_agree_with_the_sampler_of_opendp(variance):
    ours = discrete_gaussian(variance, 400_000, RandomStream.seeded(variance, "opendp"))
    assert same_law_p_value(ours, opendp_discrete_gaussian(variance)) > OPENDP_FALSE_ALARM


@pytest.mark.parametrize("variance", [20, 300, 2556**2])
def test_the_comparison_with_opendp_catches_a_variance_that_is_ten_percent_off(variance):
    ours = discrete_gaussian(variance * 11 // 10, 400_000, RandomStream.seeded(variance, "opendp"))
    assert same_law_p_value(ours, opendp_discrete_gaussian(variance)) < OPENDP_FALSE_ALARM


@pytest.mark.parametrize("variance", [1, 300, 2556**2, noise.MAX_VARIANCE])
def test_a_coin_that_floats_decide_is_decided_the_same_in_exact_arithmetic(variance):
    """With a margin as wide as the coin, every decision takes the exact path that one in 2**39 takes."""
    staircase = noise._staircase(variance)
    stream = RandomStream.seeded(variance, "coins")
    blocks = stream.below(staircase.weights.size, 400).astype(np.int64)
    integers = (blocks - staircase.num_negative) << staircase.width_bits
    coins, weights = stream.uint64(400) >> np.uint64(16), staircase.weights[blocks]
    in_floats = noise._accept(staircase, integers, weights, coins, stream)
    in_fractions = noise._accept(staircase, integers, weights, coins, stream, margin=2.0**60)
    np.testing.assert_array_equal(in_floats, in_fractions)
    assert in_floats.any()
    assert not in_floats.all()


def test_a_coin_on_its_threshold_is_decided_by_further_bits():
    staircase = noise._staircase(300)
    density = math.exp(-(17**2) / 600) * 2.0**54
    weight = float(staircase.weights[staircase.num_negative + 17])
    coin = np.array([int(density / weight * 2**48)], np.uint64)
    decided = [
        bool(noise._accept(staircase, np.array([17]), np.array([weight]), coin, RandomStream.seeded(seed))[0])
        for seed in range(200)
    ]
    assert 0 < sum(decided) < 200


@pytest.mark.parametrize("variance", [1, 2, 255, 256, 2556**2, 2**40, noise.MAX_VARIANCE])
def test_the_staircase_lies_above_the_mass_everywhere_and_reaches_14_standard_deviations(variance):
    staircase = noise._staircase(variance)
    width = 2**staircase.width_bits
    starts = np.arange(-staircase.num_negative, staircase.num_negative) * width
    for corner in (starts, starts + width - 1):
        assert np.all(staircase.weights >= 2.0**54 * np.exp(-(corner.astype(float) ** 2) / (2 * variance)))
    assert starts[-1] >= 14 * math.sqrt(variance)
    assert starts[0] <= -14 * math.sqrt(variance)
    assert sum(int(weight) for weight in staircase.weights) == int(staircase.ends[-1]) < 2**63
    assert width <= 2**16


def test_the_cut_tails_weigh_less_than_two_to_the_minus_140():
    assert (stats.norm.logsf(14) + math.log(2)) / math.log(2) < -144  # both tails, beyond 14 standard deviations


@pytest.mark.parametrize("variance", [0, -1, noise.MAX_VARIANCE + 1])
def test_a_variance_out_of_range_is_refused(variance):
    with pytest.raises(ConfigError, match="variance"):
        discrete_gaussian(variance, 1, RandomStream.seeded(0))


def test_no_coordinates_need_no_noise():
    assert discrete_gaussian(256, 0, RandomStream.seeded(0)).shape == (0,)


def test_the_same_seed_and_labels_give_the_same_bits_and_others_do_not():
    def bits(*labels: str | int, seed: int = 1) -> list[int]:
        return [int(word) for word in RandomStream.seeded(seed, *labels).uint64(4)]

    assert bits("noise", 3) == bits("noise", 3)
    streams = [
        bits("noise", 3),
        bits("noise", "3"),
        bits("noise3"),
        bits("noise", 3, seed=2),
        bits(),
        bits("noi", "se", 3),
    ]
    assert len({tuple(stream) for stream in streams}) == len(streams)
    assert list(RandomStream.from_os().uint64(4)) != list(RandomStream.from_os().uint64(4))


def test_a_stream_says_whether_it_is_seeded_and_never_shows_its_key():
    assert RandomStream.seeded(1).is_seeded
    assert not RandomStream.from_os().is_seeded
    assert repr(RandomStream.from_os()) == "RandomStream(is_seeded=False)"
    with pytest.raises(TypeError):
        pickle.dumps(RandomStream.from_os())


def test_the_key_stream_is_aes_256_in_counter_mode():
    """The first block is AES-256 of a zero block under a zero key, a published test vector."""
    stream = RandomStream(bytes(32), is_seeded=True)
    assert stream.uint64(2).tobytes().hex() == "dc95c078a2408989ad48a21492842087"


@given(st.lists(st.integers(1, 2**64 - 1), min_size=1, max_size=20), st.integers(0, 100))
def test_a_draw_below_a_bound_is_below_it(bounds, seed):
    drawn = RandomStream.seeded(seed).below(np.array(bounds, np.uint64))
    assert all(int(x) < bound for x, bound in zip(drawn, bounds, strict=True))


def test_draws_below_a_bound_are_uniform_also_where_words_must_be_refused():
    for bound in (7, 3 * 2**62):  # of the second, a quarter of the words is refused
        drawn = RandomStream.seeded(bound).below(bound, 70_000)
        counts = np.bincount([int(x) * 7 // bound for x in drawn], minlength=7)
        assert stats.chisquare(counts).pvalue > 1e-4
    with pytest.raises(ConfigError, match="bound"):
        RandomStream.seeded(0).below(0, 1)


def test_uniform_numbers_are_uniform():
    drawn = RandomStream.seeded(8).uniform(100_000)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert stats.kstest(drawn, "uniform").pvalue > 1e-4


def test_every_subset_is_equally_likely():
    stream = RandomStream.seeded(9)
    subsets = [tuple(stream.subset(5, 2)) for _ in range(5000)]
    assert all(first < second for first, second in subsets)
    counts = [subsets.count(pair) for pair in itertools.combinations(range(5), 2)]
    assert sum(counts) == 5000
    assert stats.chisquare(counts).pvalue > 1e-4
    assert list(stream.subset(3, 3)) == [0, 1, 2]
    assert list(stream.subset(3, 0)) == []
    with pytest.raises(CohortError, match="4 of 3"):
        stream.subset(3, 4)


def test_poisson_sampling_takes_each_index_by_itself_at_the_rate():
    stream = RandomStream.seeded(10)
    sampled = [stream.poisson_sample(50, 0.1) for _ in range(4000)]
    sizes = np.array([indices.size for indices in sampled])
    expected = stats.binom.pmf(np.arange(13), 50, 0.1) * 4000
    observed = np.bincount(np.minimum(sizes, 12), minlength=13)
    expected[12] = 4000 - expected[:12].sum()
    assert stats.chisquare(observed, expected).pvalue > 1e-4
    counts = np.bincount(np.concatenate(sampled), minlength=50)
    assert stats.chisquare(counts).pvalue > 1e-4
    assert sampled[0].dtype == np.int64


def test_poisson_sampling_at_rate_one_takes_all_and_at_zero_none():
    stream = RandomStream.seeded(11)
    assert list(stream.poisson_sample(3, 1.0)) == [0, 1, 2]
    assert stream.poisson_sample(1000, 0.0).size == 0
    for rate in (-0.1, 1.1, math.nan):
        with pytest.raises(ConfigError, match="sampling_rate"):
            stream.poisson_sample(3, rate)
