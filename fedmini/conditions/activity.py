"""Whether a Linux device is in use: by a person, or by programs other than this one. Works without a display.

A person is seen by
- the interrupts of built-in keyboards, touchpads and touch screens (/proc/interrupts, by their names);
- the messages of USB keyboards and mice (urbnum in /sys/bus/usb/devices: each message is answered by a new request);
- what is typed into terminals, over SSH too (when /dev/pts/N and /dev/ttyN were last read: what `w` shows as idle).
Programs are seen by the processors' time (/proc/stat) less that of this process and its children (psutil).

Not seen: a person who only watches or listens, a Bluetooth keyboard, a game pad, and from inside a container whatever
is outside it but for the processors' time. logind's IdleHint would know more of a desktop, but answers over D-Bus only.
"""

import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from fedmini.conditions import sysfs

IDLE_S = 300.0  # without a person for so long
LOAD_WINDOW_S = 5.0  # the load is a mean over at least this
STALE_S = 60.0  # and at most this
MAX_OTHERS_LOAD = 0.2  # of all processors
INPUT_INTERRUPTS = re.compile(r"i8042|i2c.hid|hid-over|touch|goodix|elan|syna|edt-ft|gpio-keys|keyboard|mouse", re.I)
HID = "03"
KEYBOARD_AND_MOUSE = frozenset({"01", "02"})  # not every HID device: power supplies and coolers report unasked
TERMINALS = (("dev/pts", "[0-9]*"), ("dev", "tty[0-9]*"))


def own_cpu_seconds() -> float:
    """The processors' time of this process, its children and what they waited for, in seconds."""
    me = psutil.Process()
    total = 0.0
    for process in (me, *me.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.Error:  # it has ended meanwhile
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return float(total)


@dataclass(frozen=True, slots=True)
class Clocks:
    """What an `Activity` measures by; each in seconds."""

    elapsed: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time
    own_cpu: Callable[[], float] = own_cpu_seconds


@dataclass(frozen=True, slots=True)
class _Load:
    at: float
    busy: float  # processor seconds since the start
    own: float


class Activity:
    """Watches one device: counters say something only by having changed, so it remembers the last reading."""

    def __init__(self, root: Path, clocks: Clocks) -> None:
        self._root = root
        self._clocks = clocks
        self._inputs: Mapping[str, int] = {}
        self._last_input = 0.0
        self._load: _Load | None = None
        self._is_calm: bool | None = None

    def is_idle(self) -> bool | None:
        """Whether nobody has used the device for IDLE_S and others' load is low; None where nothing can tell.

        A device with a keyboard counts as in use until it has been watched for IDLE_S. The load is known from
        LOAD_WINDOW_S after the first call on.
        """
        answers = [self._is_untouched(), self._are_terminals_idle(), self._are_others_calm()]
        known = [answer for answer in answers if answer is not None]
        return all(known) if known else None

    def _is_untouched(self) -> bool | None:
        counts = {**_interrupts(self._root), **_usb_messages(self._root)}
        now = self._clocks.elapsed()
        if counts != self._inputs:
            self._inputs, self._last_input = counts, now
        return now - self._last_input >= IDLE_S if counts else None

    def _are_terminals_idle(self) -> bool | None:
        ages = []
        for folder, pattern in TERMINALS:
            for terminal in sysfs.entries(self._root / folder, pattern):
                try:
                    # A clock that was set back puts readings into the future: long ago, as well as far ahead, is idle.
                    ages.append(abs(self._clocks.wall() - os.stat(terminal).st_atime))
                except OSError:  # closed meanwhile
                    continue
        return min(ages) >= IDLE_S if ages else None

    def _are_others_calm(self) -> bool | None:
        now, before = self._clocks.elapsed(), self._load
        if before is not None and now - before.at < LOAD_WINDOW_S:
            return self._is_calm
        busy, num_processors = _busy_seconds(self._root)
        if num_processors == 0:
            return None
        self._load = _Load(now, busy, self._clocks.own_cpu())
        if before is None or now - before.at > STALE_S:
            self._is_calm = None
            return None
        own = max(0.0, self._load.own - before.own)  # less than before: a child has ended that nobody waited for
        others = max(0.0, busy - before.busy - own) / (now - before.at)
        self._is_calm = others <= MAX_OTHERS_LOAD * num_processors
        return self._is_calm


def _interrupts(root: Path) -> dict[str, int]:
    """Interrupts of each line that a person's hands cause, over all processors."""
    counts = {}
    for line in (sysfs.text(root / "proc/interrupts") or "").splitlines():
        number, _, rest = line.partition(":")
        if INPUT_INTERRUPTS.search(rest):
            counts[f"interrupt {number.strip()}"] = sum(int(word) for word in _leading_numbers(rest))
    return counts


def _leading_numbers(line: str) -> list[str]:
    words = line.split()
    end = next((index for index, word in enumerate(words) if not _is_count(word)), len(words))
    return words[:end]


def _is_count(word: str) -> bool:
    return word.isascii() and word.isdecimal() and len(word) <= 20  # 64 bits


def _usb_messages(root: Path) -> dict[str, int]:
    """Requests to each USB device that is a keyboard or a mouse, or has one."""
    folder = root / "sys/bus/usb/devices"
    counts = {}
    for interface in sysfs.entries(folder, "*:*"):
        protocol = sysfs.text(interface / "bInterfaceProtocol")
        if sysfs.text(interface / "bInterfaceClass") == HID and protocol in KEYBOARD_AND_MOUSE:
            device = interface.name.partition(":")[0]
            count = sysfs.integer(folder / device / "urbnum")
            if count is not None:
                counts[f"usb {device}"] = count
    return counts


def _busy_seconds(root: Path) -> tuple[float, int]:
    """Processor seconds that anything ran since the start, and the number of processors; (0, 0) where unknown."""
    lines = (sysfs.text(root / "proc/stat") or "").splitlines()
    num_processors = sum(1 for line in lines if re.match(r"cpu\d", line))
    total = lines[0].split() if lines else []
    if len(total) < 8 or total[0] != "cpu" or not all(_is_count(word) for word in total[1:8]):
        return 0.0, 0
    user, nice, system, _idle, _iowait, irq, softirq = (int(word) for word in total[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK"), num_processors
