"""What a device knows about itself now, and who says so."""

from dataclasses import dataclass
from typing import Protocol

TEMPERATURE_RANGE_C = (-100.0, 200.0)


@dataclass(frozen=True, slots=True)
class Conditions:
    """A device, now. None: this device can't find it out, which stops no training.

    A device with a battery whose state it can't read says `on_power` = False, never None.
    """

    on_power: bool | None  # plugged in, or without a battery
    is_idle: bool | None  # nobody uses it, and nothing but the training keeps it busy
    is_unmetered: bool | None  # its network costs nothing by volume
    temperature_c: float | None  # of its hottest sensor
    free_memory_bytes: int | None  # what programs can still have without swapping


class DeviceConditions(Protocol):
    """Where conditions come from. An app on a phone supplies its own."""

    def read(self) -> Conditions:
        """The conditions now.

        Asked several times a second while training, from any thread: what takes longer than some milliseconds delays
        the end of a training whose conditions have ended.
        """
        ...


def impossible(found: object) -> str | None:
    """What is wrong with an app's answer, in our own words; None where every value is a possible one."""
    if type(found) is not Conditions:  # a subclass could answer differently each time
        return "its answer is not a Conditions"
    for name in ("on_power", "is_idle", "is_unmetered"):
        if not (getattr(found, name) is None or isinstance(getattr(found, name), bool)):
            return f"{name} is not True, False or None"
    if not (found.temperature_c is None or _is_temperature(found.temperature_c)):
        return "temperature_c is not a temperature"
    if not (found.free_memory_bytes is None or _is_size(found.free_memory_bytes)):
        return "free_memory_bytes is not a number of bytes"
    return None


def _is_temperature(value: object) -> bool:
    low, high = TEMPERATURE_RANGE_C
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high  # nan is neither


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
