"""How a device stands: what its owner may see at any time."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RunStatus:
    """A run that this device agreed to."""

    run_id: str
    manifest_hash: str
    num_contributions: int
    max_contributions: int


@dataclass(frozen=True, slots=True)
class OfferedRun:
    """A run that a server offered and nobody has agreed to yet."""

    run_id: str
    manifest_hash: str
    terms: tuple[str, ...]  # what it may cost this device, in lines, every number by its own accountant


@dataclass(frozen=True, slots=True)
class DeviceStatus:
    """How a device stands. Nothing in it is from an example."""

    name: str | None  # its name with its operator; None before the enrolment
    is_running: bool
    is_connected: bool
    why_not_training: str | None  # in words for its owner; None: it is connected, and trains when it is asked
    problem: str | None  # what went wrong last, if it has not gone well since
    num_examples: int
    key_kept_in: str  # where the key of the examples is
    runs: tuple[RunStatus, ...]
    offers: tuple[OfferedRun, ...]  # runs that wait for consent
    rounds_joined: int  # contributions, over all runs
    epsilon_spent: Mapping[str, float]  # by unit, over all runs, at lifetime_delta, rounded up
    lifetime_epsilon: float
    lifetime_delta: float
    last_adapter: tuple[str, int] | None  # its run, and after how many rounds
