"""Randomness that can be drawn again, for the processes of these tests only: no attempt, no restart changes it.

Production's takes everything from the operating system and has no way to be given a seed.
"""

from collections.abc import Iterator

from fedmini.privacy.noise import RandomStream

SEED = 7  # that of tests/tiny_run.py


def streams(*purpose: object) -> RandomStream:
    """The stream of a simulation with the same seed at its first attempt, at whatever attempt this is."""
    return RandomStream.seeded(SEED, *_first_attempt(purpose))


def _first_attempt(purpose: tuple[object, ...]) -> Iterator[object]:
    before = None
    for part in purpose:
        yield 0 if before == "attempt" else part
        before = part
