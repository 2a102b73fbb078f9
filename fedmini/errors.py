"""Every deliberate error, one class per different reaction of the caller.

FedMiniError
├── ConfigError           a setting is missing, unknown or out of range       -> fix the file
├── ModelMismatchError    this device's base or LoRA shape is not the run's   -> update the device
├── UpdateError           a message can't be used                             -> refused and counted; a round goes on
├── CohortError           too few devices                                     -> wait or stop; the message says what was spent
│   └── AttemptsError     too many attempts were lost after they were paid for -> the run is over; everything is saved
├── ProtocolError         the other side broke the secure-aggregation rules   -> abort, reveal nothing
│   ├── DealerError       another device sealed shares that can't be used   -> the server keeps the two apart
│   └── ReplayError       a round is asked for that is over for this device   -> refuse; the server's state is an old one
├── PrivacyBudgetError    the next release would pass the budget              -> the run is over; everything is saved
├── ConditionsError       this device may not train now                       -> the round goes on without it
├── LinkError             the other side can't be reached, or knows us no more -> try again later
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


class AttemptsError(CohortError):
    """So many attempts were lost after their debit that no spare one is left; what was committed is saved."""


class ConditionsError(FedMiniError):
    """This device may not train now, or not that much: what its owner allows says so."""


class LinkError(FedMiniError):
    """The other side can't be reached, or refuses to talk: `status` is its HTTP answer, where there was one."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class ProtocolError(FedMiniError):
    """The other side broke the secure-aggregation rules."""


class DealerError(ProtocolError):
    """Another device of the cohort sealed shares that can't be used: `dealer` says which."""

    def __init__(self, message: str, dealer: str) -> None:
        super().__init__(message)
        self.dealer = dealer


class ReplayError(ProtocolError):
    """A round or attempt that this device has taken part in, or an earlier one: the server's state went back."""


class PrivacyBudgetError(FedMiniError):
    """The next release would pass the budget; everything is saved."""


class StateError(FedMiniError):
    """Saved state is missing, damaged, locked or belongs to another run."""
