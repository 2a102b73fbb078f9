"""RunConfig: one TOML file describes a run. DeviceConfig: one describes a device."""

from fedmini.config.device_sections import DeviceConfig, DeviceSection, FloorsSection
from fedmini.config.sections import (
    BaseSection,
    DataSection,
    DevicePrivacy,
    EvaluationSection,
    ExamplePrivacy,
    LocalSection,
    LoraSection,
    PrivacySection,
    RoundsSection,
    RunConfig,
    RunSection,
    Section,
    SimulationSection,
    UnitPrivacy,
)
from fedmini.config.toml_file import (
    dump_run_config,
    load_device_config,
    load_run_config,
    parse_device_config,
    parse_run_config,
)

__all__ = [
    "BaseSection",
    "DataSection",
    "DeviceConfig",
    "DevicePrivacy",
    "DeviceSection",
    "EvaluationSection",
    "ExamplePrivacy",
    "FloorsSection",
    "LocalSection",
    "LoraSection",
    "PrivacySection",
    "RoundsSection",
    "RunConfig",
    "RunSection",
    "Section",
    "SimulationSection",
    "UnitPrivacy",
    "dump_run_config",
    "load_device_config",
    "load_run_config",
    "parse_device_config",
    "parse_run_config",
]
