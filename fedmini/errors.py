"""Every deliberate error, one class per different reaction of the caller.

FedMiniError
├── ConfigError           a setting is missing, unknown or out of range       -> fix the file
├── ModelMismatchError    this device's base or LoRA shape is not the run's   -> update the device
├── UpdateError           a message can't be used                             -> refused and counted; a round goes on
├── CohortError           too few devices                                     -> wait or stop; the message says what was spent
├── ProtocolError         the other side broke the secure-aggregation rules   -> abort, reveal nothing
├── PrivacyBudgetError    the next release would pass the budget              -> the run is over; everything is saved
└── StateError            saved state is missing, damaged, locked or another run's -> never start again silently

A message says what was expected, what came, and what to do. It never holds anything that a person typed.
"""


class FedMiniError(Exception):
    """The root: whoever catches it has caught everything fedmini raises on purpose."""


class ConfigError(FedMiniError):
    """A setting, a file or a package is missing, unknown or out of range."""


class ModelMismatchError(FedMiniError):
    """This device's base or LoRA shape is not the run's."""


class UpdateError(FedMiniError):
    """A message or an update can't be used."""


class CohortError(FedMiniError):
    """Too few devices. Its message says whether anything was spent: after the debit, it was."""


class ProtocolError(FedMiniError):
    """The other side broke the secure-aggregation rules."""


class PrivacyBudgetError(FedMiniError):
    """The next release would pass the budget; everything is saved."""


class StateError(FedMiniError):
    """Saved state is missing, damaged, locked or belongs to another run."""
