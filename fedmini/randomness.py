"""Where a device's and a server's randomness comes from: the operating system. Tests hand in another, and ledgers say so."""

from dataclasses import dataclass

from fedmini.privacy.noise import RandomStream, Streams


@dataclass(frozen=True, slots=True)
class Randomness:
    """The stream for each purpose, and whether anybody could draw it again."""

    streams: Streams
    is_seeded: bool


def _from_os(*purpose: object) -> RandomStream:
    return RandomStream.from_os()


FROM_OS = Randomness(_from_os, is_seeded=False)
