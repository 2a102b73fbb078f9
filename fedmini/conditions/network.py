"""Whether a Linux device's network costs nothing by volume: judged by what carries its default routes.

Sources: /proc/net/route, /proc/net/ipv6_route and /sys/class/net. What they can't tell: whether a Wi-Fi belongs to a
phone (but for two addresses that phones give themselves), what a router's own uplink costs, and what an owner has
declared to NetworkManager, which answers over D-Bus only. An app that knows better supplies its own conditions.
"""

import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedmini.conditions import sysfs

ETHERNET, PPP, RAW_IP = 1, 512, 519  # /sys/class/net/X/type: include/uapi/linux/if_arp.h; Wi-Fi is an Ethernet here
METERED_PREFIXES = ("ww", "ppp", "rmnet", "ccmni", "usb", "bnep")  # modems, and phones by cable or Bluetooth
METERED_KINDS = frozenset({"wwan", "bluetooth", "gadget"})  # DEVTYPE in uevent
METERED_DRIVERS = frozenset({"rndis_host", "cdc_ether", "cdc_ncm", "cdc_mbim", "qmi_wwan", "ipheth", "huawei_cdc_ncm"})
METERED_GATEWAYS = frozenset({"172.20.10.1", "192.168.43.1"})  # an iPhone's hotspot, and Android's until version 10
UP, REJECT = 0x1, 0x200  # flags of a route


@dataclass(frozen=True, slots=True)
class _Route:
    metric: int  # the lowest is taken
    interface: str
    gateway: str | None  # IPv4 only


def is_unmetered(root: Path) -> bool | None:
    """Whether both IPv4 and IPv6 leave over what costs nothing by volume; None where that isn't known, or there is no network.

    Mobile data, PPP, a phone by cable or Bluetooth: False. So is any USB adapter that uses a phone's drivers (some
    docks do). Ethernet and Wi-Fi hardware: True. A bridge, a tunnel or a container's interface says nothing about what
    carries it: the next route is asked.
    """
    answers = [_first_known(root, sorted(routes, key=lambda route: route.metric)) for routes in _families(root)]
    if False in answers:
        return False
    return True if True in answers else None


def _first_known(root: Path, routes: list[_Route]) -> bool | None:
    answers = (_is_unmetered(root / "sys/class/net", route) for route in routes)
    return next((answer for answer in answers if answer is not None), None)


def _is_unmetered(folder: Path, route: _Route) -> bool | None:
    interface = folder / route.interface
    kind = sysfs.integer(interface / "type")
    if kind in (PPP, RAW_IP) or route.interface.startswith(METERED_PREFIXES) or route.gateway in METERED_GATEWAYS:
        return False
    if METERED_KINDS.intersection(_devtypes(interface)) or _driver(interface) in METERED_DRIVERS:
        return False
    return True if kind == ETHERNET and os.path.lexists(interface / "device") else None


def _devtypes(interface: Path) -> tuple[str, ...]:
    lines = (sysfs.text(interface / "uevent") or "").splitlines()
    return tuple(line.partition("=")[2] for line in lines if line.startswith("DEVTYPE="))


def _driver(interface: Path) -> str | None:
    try:
        return os.path.basename(os.readlink(interface / "device/driver"))
    except OSError:
        return None


def _families(root: Path) -> tuple[list[_Route], list[_Route]]:
    """The default routes of IPv4 and of IPv6."""
    return (
        list(_ipv4(sysfs.text(root / "proc/net/route") or "")),
        list(_ipv6(sysfs.text(root / "proc/net/ipv6_route") or "")),
    )


def _ipv4(table: str) -> Iterator[_Route]:
    """Columns: interface, destination, gateway, flags, 2 counters, metric, mask; hexadecimal but for the metric."""
    for line in table.splitlines()[1:]:
        columns = line.split()
        try:
            interface, destination, gateway, flags, _, _, metric, mask = columns[:8]
            if _is_usable(flags) and int(destination, 16) == int(mask, 16) == 0:
                address = socket.inet_ntoa(struct.pack("=I", int(gateway, 16)))
                yield _Route(int(metric), _name(interface), address)
        except (ValueError, struct.error):
            continue


def _ipv6(table: str) -> Iterator[_Route]:
    """Columns: destination and its length, source and its length, next hop, metric, 2 counters, flags, interface."""
    for line in table.splitlines():
        columns = line.split()
        try:
            destination, length, _, _, _, metric, _, _, flags, interface = columns[:10]
            if _is_usable(flags) and int(destination, 16) == int(length, 16) == 0 and interface != "lo":
                yield _Route(int(metric, 16), _name(interface), None)
        except ValueError:
            continue


def _is_usable(flags: str) -> bool:
    return int(flags, 16) & (UP | REJECT) == UP


def _name(interface: str) -> str:
    """An interface's name, when it can be one: it becomes part of a path."""
    if "/" in interface or "\0" in interface or interface in {".", ".."}:
        raise ValueError("not the name of an interface")
    return interface
