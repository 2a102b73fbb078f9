"""The conditions of a Linux device, from the files of /proc, /sys and /dev; psutil gives this process's own load."""

import threading
from pathlib import Path

from fedmini.conditions import network, power, sensors
from fedmini.conditions.activity import Activity, Clocks
from fedmini.conditions.state import Conditions


class LinuxConditions:
    """A `DeviceConditions` for laptops, desktops, boards, servers and containers. Safe from several threads.

    Each value's module says where it comes from and what it can't see: power, activity, network, sensors. Needs no
    rights, no display and no D-Bus; a file that is missing or spoilt gives None, not an error. `root` is where /proc,
    /sys and /dev are looked for: a recorded tree in tests.
    """

    def __init__(self, root: Path = Path("/"), clocks: Clocks | None = None) -> None:
        self._root = root
        self._activity = Activity(root, clocks or Clocks())
        self._lock = threading.Lock()

    def read(self) -> Conditions:
        """The conditions now. Whether it is idle is known better the longer this object is asked."""
        with self._lock:
            return Conditions(
                on_power=power.on_power(self._root),
                is_idle=self._activity.is_idle(),
                is_unmetered=network.is_unmetered(self._root),
                temperature_c=sensors.temperature_c(self._root),
                free_memory_bytes=sensors.free_memory_bytes(self._root),
            )
