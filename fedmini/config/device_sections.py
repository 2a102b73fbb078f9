"""What a device's own file may say: what its owner allows, whatever a server or an operator asks for."""

from typing import Annotated

from pydantic import Field

from fedmini.config.sections import Count, Fraction, Positive, Section

# Of this much the accountant keeps 1e-12 back (docs/accounting.md, section 5).
TargetDelta = Annotated[float, Field(gt=1e-12, lt=1)]


class DeviceSection(Section):
    """What all runs together may cost, for each kind of unit by itself."""

    lifetime_epsilon: Positive = 10.0
    lifetime_delta: TargetDelta = 1e-5


class FloorsSection(Section):
    """Stricter values than those compiled in: fedmini.floors.Limits says what each means. A looser one does nothing."""

    max_epsilon: Positive | None = None
    max_target_delta: TargetDelta | None = None
    max_lone_epsilon: Positive | None = None
    max_participations: Count | None = None
    min_survivors: Count | None = None
    max_devices: Count | None = None
    min_corrupt_fraction: Fraction | None = None
    allow_no_privacy: bool | None = None
    allow_server_noise: bool | None = None


class DeviceConfig(Section):
    """One device, as its TOML file describes it. Every section has defaults: an empty file is a whole one."""

    device: DeviceSection = DeviceSection()
    floors: FloorsSection = FloorsSection()
