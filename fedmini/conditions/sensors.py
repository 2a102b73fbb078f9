"""How hot a Linux device is, and how much memory programs can still have."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from fedmini.conditions import sysfs

# Sensors that are not connected, asleep or disabled show 0, 127, -128, 255, -273 and the like.
CREDIBLE_C = (1.0, 125.0)


def temperature_c(root: Path) -> float | None:
    """The hottest credible sensor of /sys/class/thermal and /sys/class/hwmon, in °C; None where there is none."""
    low, high = CREDIBLE_C
    readings = [millidegrees / 1000 for millidegrees in _millidegrees(root / "sys/class")]
    return max((celsius for celsius in readings if low <= celsius <= high), default=None)


def free_memory_bytes(root: Path) -> int | None:
    """MemAvailable of /proc/meminfo, or what the process's cgroup (version 2) has left where that is less.

    A cgroup has left its memory.max less memory.current, with inactive_file given back; so for each above it. None where
    neither is known. The limits of cgroups of version 1 are not seen.
    """
    known = [*_available(root / "proc/meminfo"), *_left_in_cgroups(root)]
    return min(known, default=None)


def _millidegrees(folder: Path) -> Iterator[int]:
    for path in (
        *sysfs.entries(folder / "thermal", "thermal_zone*/temp"),
        *sysfs.entries(folder / "hwmon", "*/temp*_input"),
    ):
        fault = path.with_name(path.name.replace("_input", "_fault"))
        reading = sysfs.integer(path)
        if reading is not None and (fault == path or sysfs.integer(fault) != 1):
            yield reading


def _available(meminfo: Path) -> Iterator[int]:
    for line in (sysfs.text(meminfo) or "").splitlines():
        words = line.split()
        if len(words) == 3 and words[0] == "MemAvailable:" and words[2] == "kB" and words[1].isdecimal():
            yield int(words[1]) * 1024


def _left_in_cgroups(root: Path) -> Iterator[int]:
    top = root / "sys/fs/cgroup"
    for folder in _cgroups(sysfs.text(root / "proc/self/cgroup") or ""):
        limit = sysfs.integer(top / folder / "memory.max")  # "max": none
        if limit is not None:
            used = sysfs.integer(top / folder / "memory.current") or 0
            yield max(0, limit - max(0, used - _inactive_file(top / folder / "memory.stat")))


def _cgroups(table: str) -> Iterator[PurePosixPath]:
    """This process's cgroup of version 2 and all above it, the topmost last: a container sees its own there."""
    paths = [line.removeprefix("0::/") for line in table.splitlines() if line.startswith("0::/")]
    own = PurePosixPath(paths[0]) if paths and "\0" not in paths[0] else PurePosixPath()
    if own.is_absolute() or ".." in own.parts:  # outside of what this process may see
        own = PurePosixPath()
    yield own
    yield from own.parents


def _inactive_file(stat: Path) -> int:
    words = (sysfs.text(stat) or "").split()
    values = dict(zip(words[::2], words[1::2], strict=False))
    found = values.get("inactive_file", "0")
    return int(found) if found.isdecimal() else 0
