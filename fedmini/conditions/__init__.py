"""When a device may train: what it knows about itself now, what its owner allows, and what it has done today.

`Policy` decides from a `ConditionsSection`, a `DeviceConditions` (an app's own, or `LinuxConditions`) and a `DailyUsage`.
"""

from fedmini.conditions.linux import LinuxConditions
from fedmini.conditions.policy import Policy
from fedmini.conditions.state import Conditions, DeviceConditions
from fedmini.conditions.usage import DailyUsage, Usage

__all__ = ["Conditions", "DailyUsage", "DeviceConditions", "LinuxConditions", "Policy", "Usage"]
