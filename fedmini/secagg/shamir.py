"""Shamir's secret sharing over the integers mod 2**255 - 19: any `threshold` shares give the secret, fewer say nothing.

A share is the value at a holder's index of a random polynomial whose value at 0 is the secret (doi:10.1145/359168.359176).
Python's integers are not constant in time: who times a dealer's answer may learn a little of its fresh coefficients and secret,
of which every session draws new ones; a secret that is combined is known to the server anyway.
"""

from collections.abc import Callable, Mapping, Sequence

from fedmini.errors import CohortError, ConfigError

PRIME = 2**255 - 19
SHARE_BYTES = 32

Random = Callable[[int], bytes]
"""Gives so many fresh random bytes: `os.urandom`, or a test's own."""


def random_secret(random: Random) -> bytearray:
    """A uniform secret below PRIME, 32 bytes, little-endian; a bytearray, so that it can be erased."""
    return bytearray(_random_element(random).to_bytes(SHARE_BYTES, "little"))


def split(secret: bytes | bytearray, num_holders: int, threshold: int, random: Random) -> list[bytes]:
    """Shares for the holders at indices 1 to `num_holders`, in this order, 32 bytes each."""
    if not 1 <= threshold <= num_holders:
        raise ConfigError(f"a threshold must be between 1 and the {num_holders} holders, got {threshold}")
    constant = int.from_bytes(secret, "little")
    if constant >= PRIME:
        raise ConfigError("a secret must be below 2**255 - 19: draw it with random_secret")
    coefficients = [_random_element(random) for _ in range(threshold - 1)]
    shares = []
    for index in range(1, num_holders + 1):
        value = 0
        for coefficient in coefficients:
            value = (value + coefficient) * index % PRIME
        shares.append(((value + constant) % PRIME).to_bytes(SHARE_BYTES, "little"))
    return shares


def is_share(share: bytes) -> bool:
    """Whether these bytes are an element of the field, in the one way that it is written."""
    return len(share) == SHARE_BYTES and int.from_bytes(share, "little") < PRIME


def weights(indices: Sequence[int]) -> dict[int, int]:
    """Lagrange's coefficients at 0 for holders at these indices: the same for every secret that they hold shares of."""
    if len(set(indices)) != len(indices) or not all(0 < index < PRIME for index in indices):
        raise ConfigError("each holder has an index of its own, from 1")
    found = {}
    for index in indices:
        above = below = 1
        for other in indices:
            if other != index:
                above = above * other % PRIME
                below = below * (other - index) % PRIME
        found[index] = above * pow(below, -1, PRIME) % PRIME
    return found


def combine(shares: Mapping[int, bytes], coefficients: Mapping[int, int]) -> bytearray:
    """The secret from the shares at all of the coefficients' indices, 32 bytes; others that are given are not used.

    Raises CohortError where one is missing. With fewer indices than the threshold, or a wrong share, gives a wrong secret.
    """
    total = 0
    for index, coefficient in coefficients.items():
        if index not in shares:
            raise CohortError(f"the share at index {index} is missing")
        total += coefficient * int.from_bytes(shares[index], "little")
    return bytearray((total % PRIME).to_bytes(SHARE_BYTES, "little"))


def _random_element(random: Random) -> int:
    while True:
        value = int.from_bytes(random(SHARE_BYTES), "little") & (2**255 - 1)
        if value < PRIME:  # all but one in 2**250
            return value
