"""fedmini fine-tunes small language models on data that never leaves the devices that hold it."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedmini.conditions import Conditions as Conditions
    from fedmini.conditions import DeviceConditions as DeviceConditions
    from fedmini.config import RunConfig as RunConfig
    from fedmini.config import load_run_config as load_run_config
    from fedmini.device import Device as Device
    from fedmini.errors import FedMiniError as FedMiniError
    from fedmini.simulation import SimulationOptions as SimulationOptions
    from fedmini.simulation import SimulationResult as SimulationResult
    from fedmini.simulation import simulate as simulate

_HOMES = {
    "Conditions": "fedmini.conditions",
    "Device": "fedmini.device",
    "DeviceConditions": "fedmini.conditions",
    "FedMiniError": "fedmini.errors",
    "RunConfig": "fedmini.config",
    "SimulationOptions": "fedmini.simulation",
    "SimulationResult": "fedmini.simulation",
    "load_run_config": "fedmini.config",
    "simulate": "fedmini.simulation",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used: `import fedmini` itself is instant."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fedmini' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
