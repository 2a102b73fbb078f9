"""What LinuxConditions makes of recorded devices, of spoilt files, and of the machine that runs the tests."""

import dataclasses
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recorded_devices import (
    CONTAINER,
    DESKTOP,
    LAPTOP_CHARGING,
    LAPTOP_ON_BATTERY,
    LINK,
    PHONE_LIKE_BOARD,
    ROUTE,
    VIRTUAL_MACHINE,
    WWAN,
    Tree,
    default_route,
    network,
    record,
    stat,
    use_terminal,
)

from fedmini.conditions import Conditions, LinuxConditions, activity, state
from fedmini.conditions.activity import Clocks

MIB = 2**20


@dataclass
class Watch:
    """Clocks that stand until a test moves them."""

    elapsed: float = 1000.0
    wall: float = 1_700_000_000.0
    own_cpu: float = 50.0

    def clocks(self) -> Clocks:
        return Clocks(lambda: self.elapsed, lambda: self.wall, lambda: self.own_cpu)


def read(root: Path, tree: Tree) -> Conditions:
    return LinuxConditions(record(root, tree), Watch().clocks()).read()


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        (LAPTOP_ON_BATTERY, Conditions(False, False, True, 61.0, 4_096_000_000)),
        (LAPTOP_CHARGING, Conditions(True, False, True, 61.0, 4_096_000_000)),
        (DESKTOP, Conditions(True, False, True, 45.25, 16_384_000_000)),
        (PHONE_LIKE_BOARD, Conditions(True, False, True, 38.5, 1_536_000_000)),
        (WWAN, Conditions(True, False, False, 61.0, 4_096_000_000)),
        (VIRTUAL_MACHINE, Conditions(None, None, None, None, None)),
        # Of 900 MiB the tenant uses 500, but could drop 200; the job alone could have 600.
        (CONTAINER, Conditions(None, None, None, None, 600 * MIB)),
    ],
    ids=["laptop on battery", "laptop charging", "desktop", "phone-like board", "wwan", "virtual machine", "container"],
)
def test_a_recorded_device_is_read_as_it_was(tmp_path: Path, tree: Tree, expected: Conditions) -> None:
    assert read(tmp_path, tree) == expected


def test_the_machine_that_runs_the_tests_gives_possible_values() -> None:
    found = LinuxConditions().read()
    assert state.impossible(found) is None
    assert found.free_memory_bytes is not None and found.free_memory_bytes > MIB


def supplies(**values: str) -> Tree:
    return {f"sys/class/power_supply/{name.replace('__', '/')}": value for name, value in values.items()}


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        (supplies(BAT0__type="Battery", BAT0__status="Unknown"), False),
        (supplies(BAT0__type="Battery"), False),  # its status can't be read
        (supplies(BAT0__status="Charging", BAT1__status="Unknown"), True),
        (supplies(BAT0__capacity="50"), False),  # says nothing about itself
        (supplies(BAT0__type="Battery", BAT0__status="Unknown", AC__type="Mains", AC__online="1"), True),
        (supplies(BAT0__type="Battery", BAT0__status="Full", AC__type="Mains", AC__online="0"), False),
        (supplies(BAT0__type="Battery", BAT0__status="Not charging"), True),
        (supplies(BAT0__type="Battery", BAT0__status="Discharging", AC__type="USB", AC__online="1"), False),
        (supplies(BAT0__type="Battery", BAT0__present="0", BAT0__status="Unknown"), True),
        (supplies(ups__type="UPS", ups__status="Discharging"), False),
        (supplies(usb__type="USB", usb__online="nonsense"), True),
    ],
)
def test_a_battery_that_may_be_draining_is_not_on_power(tmp_path: Path, tree: Tree, expected: bool) -> None:
    assert read(tmp_path, tree).on_power is expected


def test_a_device_without_any_supply_is_on_power(tmp_path: Path) -> None:
    (tmp_path / "sys/class/power_supply").mkdir(parents=True)
    assert read(tmp_path, {}).on_power is True


IPV6_ROUTE = "0" * 32 + " 00 " + "0" * 32 + " 00 fe80000000000000021122fffe334455 {:08x} 00000001 00000000 {:08x} {}\n"


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        (network("ppp0", "none", kind=512), False),
        (network("rmnet_data0", "none", kind=519), False),
        (network("enx0a0b0c", "rndis_host"), False),  # a phone by cable
        (network("enx0a0b0d", "r8152"), True),  # an adapter
        (network("eth5", "ipheth"), False),
        (network("wlan0", "ath10k", devtype="wlan"), True),
        ({**network("wlan0", "ath10k"), "proc/net/route": ROUTE + default_route("wlan0", gateway="010A14AC")}, False),
        ({"proc/net/route": ROUTE}, None),  # no network
        ({**network("eth0", "e1000"), "proc/net/route": ROUTE + default_route("eth0").replace("0003", "0002")}, None),
        ({**network("eth0", "e1000"), "proc/net/ipv6_route": IPV6_ROUTE.format(1, 3, "wwan0")}, False),
        ({**network("eth0", "e1000"), "proc/net/ipv6_route": IPV6_ROUTE.format(1, 0x201, "wwan0")}, True),
        ({"proc/net/ipv6_route": IPV6_ROUTE.format(1, 3, "wwan0")}, False),
    ],
)
def test_what_carries_the_default_route_says_what_it_costs(tmp_path: Path, tree: Tree, expected: bool | None) -> None:
    assert read(tmp_path, tree).is_unmetered is expected


@pytest.mark.parametrize(("wifi_metric", "modem_metric", "expected"), [(600, 700, True), (600, 500, False)])
def test_of_two_networks_the_one_that_is_taken_counts(
    tmp_path: Path, wifi_metric: int, modem_metric: int, expected: bool
) -> None:
    routes = ROUTE + default_route("wlan0", wifi_metric) + default_route("wwan0", modem_metric)
    tree = {**network("wlan0", "ath10k"), **network("wwan0", "qmi_wwan"), "proc/net/route": routes}
    assert read(tmp_path, tree).is_unmetered is expected


def test_a_tunnel_costs_what_carries_it(tmp_path: Path) -> None:
    routes = ROUTE + default_route("tun0", 50) + default_route("wwan0", 700)
    tree = {**network("wwan0", "qmi_wwan"), "sys/class/net/tun0/type": "65534", "proc/net/route": routes}
    assert read(tmp_path, tree).is_unmetered is False


@pytest.mark.parametrize(
    ("name", "content", "later"),
    [
        ("proc/interrupts", "  1:  10  20  IO-APIC  1-edge  i8042\n", "  1:  10  21  IO-APIC  1-edge  i8042\n"),
        ("sys/bus/usb/devices/1-4/urbnum", "500\n", "501\n"),
    ],
    ids=["built-in keyboard", "USB keyboard"],
)
def test_a_touched_key_makes_five_minutes_of_use(tmp_path: Path, name: str, content: str, later: str) -> None:
    usb = {key: value for key, value in DESKTOP.items() if "1-4:1.0" in key}
    watch = Watch()
    device = LinuxConditions(record(tmp_path, {**usb, name: content}), watch.clocks())
    assert device.read().is_idle is False  # watched for too short
    watch.elapsed += 300
    assert device.read().is_idle is True
    record(tmp_path, {name: later})
    assert device.read().is_idle is False
    watch.elapsed += 299
    assert device.read().is_idle is False
    watch.elapsed += 1
    assert device.read().is_idle is True


def test_what_is_no_keyboard_is_not_taken_for_one(tmp_path: Path) -> None:
    other = {"sys/bus/usb/devices/1-5/urbnum": "900", "proc/interrupts": "  9:  7  7  IO-APIC  9-fasteoi  acpi\n"}
    kind = {"sys/bus/usb/devices/1-5:1.0/bInterfaceClass": "03", "sys/bus/usb/devices/1-5:1.0/bInterfaceProtocol": "00"}
    assert read(tmp_path, {**other, **kind}).is_idle is None


@pytest.mark.parametrize(("seconds_ago", "expected"), [(0, False), (299, False), (301, True), (-86_400, True)])
def test_a_terminal_that_was_typed_into_is_in_use(tmp_path: Path, seconds_ago: float, expected: bool) -> None:
    watch = Watch()
    use_terminal(tmp_path, watch.wall - seconds_ago)
    assert LinuxConditions(tmp_path, watch.clocks()).read().is_idle is expected


@pytest.mark.parametrize(
    ("busy_s", "own_s", "expected"),
    [
        (20.0, 20.0, True),  # two processors for 10 s, all of it the training's
        (20.0, 16.1, True),  # others: 3.9 of 20
        (20.0, 15.9, False),  # others: 4.1 of 20, a fifth is 4
        (0.0, 0.0, True),
        (4.1, 0.0, False),
        (20.0, -5.0, False),  # a child has ended that nobody waited for
    ],
)
def test_the_load_of_others_is_use_and_the_trainings_own_is_not(
    tmp_path: Path, busy_s: float, own_s: float, expected: bool
) -> None:
    watch = Watch()
    device = LinuxConditions(record(tmp_path, stat(100.0)), watch.clocks())
    assert device.read().is_idle is None
    record(tmp_path, stat(100.0 + busy_s))
    watch.elapsed += 10
    watch.own_cpu += own_s
    assert device.read().is_idle is expected
    watch.elapsed += 4  # too soon for another mean: the last one stands
    assert device.read().is_idle is expected


def test_a_load_from_long_ago_says_nothing(tmp_path: Path) -> None:
    watch = Watch()
    device = LinuxConditions(record(tmp_path, stat(100.0)), watch.clocks())
    device.read()
    watch.elapsed += 3600
    assert device.read().is_idle is None


def test_ones_own_time_includes_a_child_that_runs_and_one_that_has_ended() -> None:
    burn = "import time\nwhile time.process_time() < 0.2: pass\n"
    before = activity.own_cpu_seconds()
    subprocess.run([sys.executable, "-c", burn], check=True)
    after_the_first = activity.own_cpu_seconds()
    running = subprocess.Popen(
        [sys.executable, "-c", burn + "print(flush=True)\ninput()\n"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert running.stdout is not None
    running.stdout.readline()
    after_the_second = activity.own_cpu_seconds()
    running.communicate(b"\n")
    assert after_the_first - before >= 0.15
    assert after_the_second - after_the_first >= 0.15


ALL_SOURCES = sorted({name for tree in (LAPTOP_CHARGING, DESKTOP, PHONE_LIKE_BOARD, CONTAINER) for name in tree})
SPOILT = st.one_of(
    st.binary(max_size=60),
    st.sampled_from(
        [b"", b"-1", b"9" * 5000, b"0::/../..\n", b"0::/\0\n", b"\xff\xfe", b"cpu  1 2 3\n", b"1: " + b"9" * 5000]
    ),
    st.from_regex(rb"(cpu|MemAvailable:|inactive_file|eth0|1:|0::/)[ \t0-9a-f/.:kBi]{0,60}\n", fullmatch=True),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(
    spoilt=st.dictionaries(st.sampled_from([name for name in ALL_SOURCES if "driver" not in name]), SPOILT, max_size=8)
)
def test_spoilt_files_give_possible_values_and_no_error(tmp_path: Path, spoilt: dict[str, bytes]) -> None:
    for tree in (PHONE_LIKE_BOARD, LAPTOP_CHARGING, DESKTOP, CONTAINER):
        record(tmp_path, tree)
    for name, content in spoilt.items():
        path = record(tmp_path, {name: ""}) / name
        path.write_bytes(content)
    watch = Watch()
    device = LinuxConditions(tmp_path, watch.clocks())
    for _ in range(2):
        assert state.impossible(device.read()) is None
        watch.elapsed += 10


def test_folders_where_files_should_be_give_unknown_values(tmp_path: Path) -> None:
    for name in ALL_SOURCES:
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
    found = LinuxConditions(tmp_path, Watch().clocks()).read()
    assert found.on_power is False  # something is there that says nothing: it could be a battery
    assert {getattr(found, name.name) for name in dataclasses.fields(found)} == {False, None}


def test_a_name_that_leads_out_of_its_folder_is_not_followed(tmp_path: Path) -> None:
    record(tmp_path, {**network("eth0", "e1000"), "sys/secret/type": "1", "sys/secret/device": f"{LINK}nowhere"})
    record(tmp_path, {"proc/net/route": ROUTE + default_route("../../secret")})
    assert LinuxConditions(tmp_path, Watch().clocks()).read().is_unmetered is None
    assert os.path.lexists(tmp_path / "sys/class/net/../../secret/device")
