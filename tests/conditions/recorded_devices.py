"""What the files of /proc, /sys and /dev say on different devices, as far as `LinuxConditions` reads them."""

import os
from collections.abc import Mapping
from pathlib import Path

ROUTE = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
INTERRUPTS = "            CPU0       CPU1\n"
LINK = "-> "  # a symbolic link, by its target

Tree = Mapping[str, str]


def default_route(interface: str, metric: int = 100, gateway: str = "0101A8C0") -> str:
    """A line of /proc/net/route, as x86 and ARM write it: 0101A8C0 is 192.168.1.1."""
    return f"{interface}\t00000000\t{gateway}\t0003\t0\t0\t{metric}\t00000000\t0\t0\t0\n"


def memory(available_kib: int) -> Tree:
    return {"proc/meminfo": f"MemTotal: {2 * available_kib} kB\nMemFree: 5 kB\nMemAvailable:   {available_kib} kB\n"}


def stat(busy_s: float, num_processors: int = 2) -> Tree:
    """/proc/stat at 100 ticks a second; what is idle, waits or is stolen doesn't count."""
    ticks = round(busy_s * 100)
    each = "".join(f"cpu{index} 1 1 1 1 1 1 1 0 0 0\n" for index in range(num_processors))
    return {"proc/stat": f"cpu  {ticks} 0 0 99999 99999 0 0 99999 0 0\n{each}intr 5\n"}


def network(interface: str, driver: str, kind: int = 1, devtype: str = "") -> Tree:
    """One interface that has the default route."""
    return {
        "proc/net/route": ROUTE
        + f"{interface}\t0001A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\n"
        + default_route(interface),
        f"sys/class/net/{interface}/type": f"{kind}\n",
        f"sys/class/net/{interface}/uevent": (f"DEVTYPE={devtype}\n" if devtype else "") + f"INTERFACE={interface}\n",
        f"sys/class/net/{interface}/device/driver": f"{LINK}../../../bus/drivers/{driver}",
    }


LAPTOP_ON_BATTERY: Tree = {
    "sys/class/power_supply/AC/type": "Mains\n",
    "sys/class/power_supply/AC/online": "0\n",
    "sys/class/power_supply/BAT0/type": "Battery\n",
    "sys/class/power_supply/BAT0/present": "1\n",
    "sys/class/power_supply/BAT0/status": "Discharging\n",
    "sys/class/power_supply/hidpp_battery_0/type": "Battery\n",  # of a mouse
    "sys/class/power_supply/hidpp_battery_0/scope": "Device\n",
    "sys/class/power_supply/hidpp_battery_0/status": "Discharging\n",
    "sys/class/thermal/thermal_zone0/temp": "27800\n",
    "sys/class/thermal/thermal_zone1/temp": "-274000\n",  # a Wi-Fi card that is off
    "sys/class/hwmon/hwmon3/temp1_input": "61000\n",
    "sys/class/hwmon/hwmon3/temp2_input": "127000\n",  # not connected
    "sys/class/hwmon/hwmon3/temp3_input": "99000\n",
    "sys/class/hwmon/hwmon3/temp3_fault": "1\n",
    "proc/interrupts": INTERRUPTS
    + "   1:    10    20   IO-APIC   1-edge      i8042\n   9:   7   7   IO-APIC   9-fasteoi   acpi\n",
    **stat(busy_s=100.0),
    **memory(available_kib=4_000_000),
    **network("wlp2s0", "iwlwifi", devtype="wlan"),
}

LAPTOP_CHARGING: Tree = {
    **LAPTOP_ON_BATTERY,
    "sys/class/power_supply/AC/online": "1\n",
    "sys/class/power_supply/BAT0/status": "Charging\n",
}

DESKTOP: Tree = {
    "sys/class/power_supply/ucsi-source-psy-USBC000:001/type": "USB\n",  # a port that could give power to others
    "sys/class/power_supply/ucsi-source-psy-USBC000:001/online": "0\n",
    "sys/class/hwmon/hwmon0/temp1_input": "45250\n",
    "sys/bus/usb/devices/1-4/urbnum": "500\n",
    "sys/bus/usb/devices/1-4:1.0/bInterfaceClass": "03\n",
    "sys/bus/usb/devices/1-4:1.0/bInterfaceProtocol": "01\n",
    "sys/bus/usb/devices/1-5/urbnum": "900\n",
    "sys/bus/usb/devices/1-5:1.0/bInterfaceClass": "08\n",  # a disk
    "sys/bus/usb/devices/1-5:1.0/bInterfaceProtocol": "50\n",
    **stat(busy_s=100.0),
    **memory(available_kib=16_000_000),
    **network("enp3s0", "r8169"),
}

PHONE_LIKE_BOARD: Tree = {
    "sys/class/power_supply/battery/type": "Battery\n",
    "sys/class/power_supply/battery/status": "Full\n",
    "sys/class/power_supply/bms/type": "BMS\n",  # a gauge, which gives no power and takes none
    "sys/class/thermal/thermal_zone0/temp": "0\n",
    "sys/class/thermal/thermal_zone7/temp": "38500\n",
    "proc/interrupts": INTERRUPTS + " 201:   55   0   gpio  12-edge   Goodix-TS\n",
    **stat(busy_s=100.0, num_processors=8),
    **memory(available_kib=1_500_000),
    **network("wlan0", "wcnss", devtype="wlan"),
}

VIRTUAL_MACHINE: Tree = {}

WWAN: Tree = {**LAPTOP_CHARGING, **network("wwp0s20", "cdc_mbim", devtype="wwan")}

CONTAINER: Tree = {
    "proc/self/cgroup": "0::/tenant/job\n",
    "sys/fs/cgroup/memory.max": "max\n",
    "sys/fs/cgroup/tenant/memory.max": f"{900 * 2**20}\n",
    "sys/fs/cgroup/tenant/memory.current": f"{500 * 2**20}\n",
    "sys/fs/cgroup/tenant/memory.stat": f"anon {300 * 2**20}\ninactive_file {200 * 2**20}\n",
    "sys/fs/cgroup/tenant/job/memory.max": f"{700 * 2**20}\n",
    "sys/fs/cgroup/tenant/job/memory.current": f"{100 * 2**20}\n",
    "proc/net/route": ROUTE + default_route("eth0"),
    "sys/class/net/eth0/type": "1\n",  # one half of a pair: no device
    **memory(available_kib=64_000_000),
}


def record(root: Path, tree: Tree) -> Path:
    """Write a tree under a folder, over what is there."""
    for name, content in tree.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content.startswith(LINK):
            path.unlink(missing_ok=True)
            path.symlink_to(content.removeprefix(LINK))
        else:
            path.write_text(content)
    return root


def use_terminal(root: Path, at: float) -> None:
    """Let somebody have typed into a terminal at a time."""
    record(root, {"dev/pts/0": ""})
    os.utime(root / "dev/pts/0", (at, at))
