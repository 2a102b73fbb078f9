"""What a device's own file may say: what its owner allows, whatever a server or an operator asks for."""

from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from fedmini.config.sections import BaseSection, Count, Fraction, Positive, Section

# Of this much the accountant keeps 1e-12 back (docs/accounting.md, section 5).
TargetDelta = Annotated[float, Field(gt=1e-12, lt=1)]

# What SQLite can count.
StoredCount = Annotated[int, Field(ge=1, lt=2**63)]


class DeviceSection(Section):
    """Which server this device takes part with, and what all runs together may cost, for each kind of unit by itself."""

    server: Annotated[str, Field(pattern=r"^https?://[^\s/]+$")] | None = None  # https://HOST:PORT
    server_key: Path | None = None  # the certificate that the server's is checked against, PEM; None: the system's
    lifetime_epsilon: Positive = 10.0
    lifetime_delta: TargetDelta = 1e-5

    @field_validator("server")
    @classmethod
    def _an_address(cls, server: str | None) -> str | None:
        if server is not None and not _is_address(server):
            raise ValueError("expected https://HOST:PORT, with a port from 1 to 65535")
        return server


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


class StoreSection(Section):
    """How many of a person's examples are kept, how long, and in how much room; the oldest go first."""

    max_examples: StoredCount = 10_000
    max_age_days: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] | None = None  # None: no limit
    max_bytes: StoredCount = 64 * 2**20


class ConditionsSection(Section):
    """When this device may train. What it can't find out about itself doesn't stop it, but for a battery's state."""

    on_power: bool = True  # only while it is plugged in, or has no battery
    idle: bool = True  # only while nobody uses it
    unmetered: bool = True  # only on a network that costs nothing by volume
    max_temperature_c: Positive | None = 80.0  # of the hottest sensor
    min_free_memory_bytes: Annotated[int, Field(ge=0)] = 2**30
    # When it may not train, by the clock on its wall; "22:00-07:00" is over midnight.
    quiet_hours: Annotated[str, Field(pattern=r"^([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d$")] | None = None
    max_minutes_per_day: Positive | None = 120.0
    max_contributions_per_day: Count | None = None

    @field_validator("quiet_hours")
    @classmethod
    def _two_ends(cls, quiet_hours: str | None) -> str | None:
        if quiet_hours is not None and len(set(quiet_hours.split("-"))) == 1:
            raise ValueError("begins and ends at once: is that all day or never? Leave it out for never")
        return quiet_hours


class TrainingSection(Section):
    """What one round of training may take on this device; a round that would take more goes on without it."""

    max_seconds: Positive = 900.0
    max_memory_bytes: Count = 2 * 2**30  # of the whole process; checked between batches
    max_examples: Count = 1000  # in a run's frozen training set
    num_threads: Annotated[int, Field(ge=0)] = 1  # 0: one for each core this process may use
    physical_batch_size: Count = 4  # examples in memory at once
    checkpointing: bool = False  # less memory, a third more time; not where a run detaches the template's beginning
    # Settings of the whole process's allocator, so that it holds less. None: in `fedmini device serve`, never in an app.
    small_heap: bool | None = None
    # Of what layers below the adapted ones say of the run's examples, encrypted in the device's folder; 0: none is kept.
    max_hidden_bytes: Annotated[int, Field(ge=0)] = 256 * 2**20


class ConsentSection(Section):
    """Runs that are agreed to in advance, by the hash of their manifest; any other asks the device's owner."""

    manifests: tuple[Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")], ...] = ()


class DeviceConfig(Section):
    """One device, as its TOML file describes it. Every section has defaults: an empty file is a whole one."""

    device: DeviceSection = DeviceSection()
    base: BaseSection = BaseSection(name="smollm2-135m-q4")
    floors: FloorsSection = FloorsSection()
    store: StoreSection = StoreSection()
    conditions: ConditionsSection = ConditionsSection()
    training: TrainingSection = TrainingSection()
    consent: ConsentSection = ConsentSection()


def _is_address(server: str) -> bool:
    try:
        found = urlsplit(server)
        is_bare = found.username is None and found.netloc == server.partition("//")[2]
        return bool(found.hostname) and found.port != 0 and is_bare
    except ValueError:  # of the port, or of an IPv6 address without its end
        return False
