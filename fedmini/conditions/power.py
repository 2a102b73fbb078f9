"""Whether a Linux device is on power: /sys/class/power_supply (kernel: Documentation/ABI/testing/sysfs-class-power)."""

from dataclasses import dataclass
from pathlib import Path

from fedmini.conditions import sysfs

BATTERIES = frozenset({"Battery", "UPS"})
NOT_DRAINED = frozenset({"Full", "Not charging"})  # "Not charging": held below full by a charging limit


@dataclass(frozen=True, slots=True)
class _Supplies:
    batteries: tuple[str | None, ...]  # the status of each, None where it can't be read
    lines: tuple[bool, ...]  # whether each socket, port or pad gives power


def on_power(root: Path) -> bool | None:
    """Whether the device is plugged in or has no battery; None where the kernel doesn't say (no such folder).

    No supply at all is a desktop: on power. A battery that drains outweighs a charger that is too weak. Where there is
    a battery and nothing says that it isn't drained (its status is unknown, or can't be read), False.
    """
    folder = root / "sys/class/power_supply"
    if not folder.is_dir():
        return None
    supplies = _read(folder)
    if "Discharging" in supplies.batteries:
        return False
    if not supplies.batteries or any(supplies.lines) or "Charging" in supplies.batteries:
        return True
    # "Full" stays for a while after the plug is pulled: where a socket is known, it is the one to say.
    return not supplies.lines and NOT_DRAINED.issuperset(supplies.batteries)


def _read(folder: Path) -> _Supplies:
    batteries: list[str | None] = []
    lines: list[bool] = []
    for supply in sysfs.entries(folder, "*"):
        kind = sysfs.text(supply / "type")
        if sysfs.text(supply / "scope") == "Device":  # of a mouse or a keyboard
            continue
        if kind is None or kind in BATTERIES:  # one that doesn't say what it is could be a battery
            if sysfs.integer(supply / "present") != 0:  # 0: an empty bay
                batteries.append(sysfs.text(supply / "status"))
        elif (online := sysfs.integer(supply / "online")) is not None:
            lines.append(online > 0)  # 1: fixed voltage, 2: programmable
    return _Supplies(tuple(batteries), tuple(lines))
