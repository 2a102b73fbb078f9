"""The device that apps embed: it keeps a person's examples, trains when it may, and shows what left it.

DIR/examples/        the examples, encrypted            DIR/device.toml      the owner's limits, where there is one
DIR/receipts.jsonl   what left this device              DIR/adapters/        the newest adapter
DIR/offers/          runs that wait for consent         DIR/usage.json       minutes trained today
DIR/hidden/          what frozen layers say of the run's examples, encrypted
and the files of `fedmini.enrolment`: its keys, whom it believes, what it agreed to, its ledger.
"""

from fedmini.device.embedded import Device
from fedmini.device.receipts import DeviceReceipt
from fedmini.device.standing import DeviceStatus, OfferedRun, RunStatus

__all__ = ["Device", "DeviceReceipt", "DeviceStatus", "OfferedRun", "RunStatus"]
