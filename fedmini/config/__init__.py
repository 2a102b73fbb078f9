"""RunConfig: one TOML file describes a run."""

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
from fedmini.config.toml_file import dump_run_config, load_run_config, parse_run_config

__all__ = [
    "BaseSection",
    "DataSection",
    "DevicePrivacy",
    "EvaluationSection",
    "ExamplePrivacy",
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
    "load_run_config",
    "parse_run_config",
]
