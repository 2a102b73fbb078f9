"""After which rounds a loss is measured: before the first, after every so many, and at the end."""


def is_due(round_num: int, every: int, num_rounds: int) -> bool:
    """Whether the loss is measured after this round; round 0 is before any training."""
    return round_num % every == 0 or round_num == num_rounds


def index_after(round_num: int, every: int, num_rounds: int) -> int:
    """Which measurement the one after this round is, counted from 1, where it is due."""
    return round_num // every + 1 + (round_num == num_rounds and round_num % every != 0)


def num_measured(every: int, num_rounds: int) -> int:
    """How many measurements a whole run has."""
    return index_after(num_rounds, every, num_rounds)
