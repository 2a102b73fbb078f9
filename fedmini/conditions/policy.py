"""Whether a device may train now, and if not, a sentence for its owner."""

import time
from collections.abc import Callable
from datetime import datetime
from datetime import time as time_of_day

from fedmini.conditions.state import Conditions, DeviceConditions, impossible
from fedmini.conditions.usage import DailyUsage, Usage
from fedmini.config.device_sections import ConditionsSection

APP_FAILED = "the app's conditions failed"
MIB = 2**20


def local_time() -> datetime:
    """The wall clock where the device is, also after its time zone has changed."""
    time.tzset()
    return datetime.now()


class Policy:
    """What a device's owner allows, held against what the device is doing. Decides, and changes nothing."""

    def __init__(
        self,
        limits: ConditionsSection,
        conditions: DeviceConditions,
        usage: DailyUsage,
        now: Callable[[], datetime] = local_time,
    ) -> None:
        self._limits = limits
        self._conditions = conditions
        self._usage = usage
        self._now = now

    def why_not(self) -> str | None:
        """What holds training back and when that may change, in one sentence; None: it may train.

        Asked before a round and several times a second during it. The first of several reasons, the hours first. What
        `conditions` raises or makes up is a reason too, told by its class only: its message could hold what a person
        typed.
        """
        return self._hours() or self._day() or self._device()

    def _hours(self) -> str | None:
        quiet_hours = self._limits.quiet_hours
        if quiet_hours is None or not is_quiet(quiet_hours, self._now().time()):
            return None
        return f"quiet hours until {quiet_hours.partition('-')[2]}"

    def _day(self) -> str | None:
        minutes, contributions = self._limits.max_minutes_per_day, self._limits.max_contributions_per_day
        if minutes is None and contributions is None:
            return None
        usage = self._usage.today()
        if usage.problem is not None:
            return self._unknown_day(usage)
        if minutes is not None and usage.seconds >= minutes * 60:
            return f"it has trained for the {minutes:g} minutes that it may a day, until midnight"
        if contributions is not None and usage.contributions >= contributions:
            return f"it has contributed as often as it may a day ({contributions}), until midnight"
        return None

    def _unknown_day(self, usage: Usage) -> str:
        if usage.problem == "set back":
            return (
                f"its clock was set back, until it is {usage.day} again; delete {self._usage.path.name} in its folder "
                "if the clock was wrong on that day"
            )
        if usage.problem == "unwritable":
            return (
                f"it can't write down how long it trains, until there is room for {self._usage.path.name} on its disk"
            )
        return "the record of how long it trained today is damaged, which counts as used up, until midnight"

    def _device(self) -> str | None:
        try:
            found = self._conditions.read()
        except Exception as error:  # an app's code: whatever it does must not end the device
            return f"{APP_FAILED}: {type(error).__name__}"
        problem = impossible(found)
        return self._held_by(found) if problem is None else f"{APP_FAILED}: {problem}"

    def _held_by(self, found: Conditions) -> str | None:
        limits = self._limits
        if limits.on_power and found.on_power is False:
            return "it runs on its battery as far as it can tell, until it is plugged in"
        if limits.idle and found.is_idle is False:
            return "it is in use, until it has been left alone for some minutes"
        if limits.unmetered and found.is_unmetered is False:
            return "its network may cost by volume (mobile data or a phone's), until it is on another"
        hottest, most = found.temperature_c, limits.max_temperature_c
        if hottest is not None and most is not None and hottest > most:
            return f"it is at {hottest:.1f} °C, until it has cooled down to {most:g} °C"
        free, least = found.free_memory_bytes, limits.min_free_memory_bytes
        if free is not None and free < least:
            return f"{free // MIB} MiB of its memory are free, until {-(-least // MIB)} MiB are"
        return None


def is_quiet(quiet_hours: str, at: time_of_day) -> bool:
    """Whether a time lies in "HH:MM-HH:MM": the first minute does, the last doesn't; 22:00-07:00 is over midnight.

    What counts is what the clock on the wall shows: where summer time skips an end, the hours end with the jump; an hour
    that comes twice is twice quiet, or twice not. Equal ends, which `ConditionsSection` refuses, are no hours at all.
    """
    begin, end = (time_of_day.fromisoformat(part) for part in quiet_hours.split("-"))
    moment = at.replace(tzinfo=None)
    return begin <= moment < end if begin <= end else moment >= begin or moment < end
