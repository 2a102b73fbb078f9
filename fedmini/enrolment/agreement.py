"""What a device checks, of all that it remembers, before it follows its operator or agrees to a run."""

from collections import Counter
from collections.abc import Mapping, Sequence

from fedmini.errors import PrivacyBudgetError, ProtocolError
from fedmini.privacy import accounting, device_ledger
from fedmini.privacy.device_ledger import LifetimeLimits, Receipt
from fedmini.secagg.rotation import Rotation
from fedmini.types import Manifest, PrivacyEvent, Unit


def check_extends(before: Sequence[Rotation], rotations: Sequence[Rotation]) -> None:
    """Raise ProtocolError where rotations leave out, or replace, one that this device has followed."""
    if tuple(rotations[: len(before)]) != tuple(before):
        raise ProtocolError(
            f"expected the {len(before)} rotations that this device has followed, and perhaps more, got others: they are "
            "old ones played back, or somebody else signed with a key that the operator has left"
        )


def check_run(manifest: Manifest, known: Mapping[str, str]) -> None:
    """Raise ProtocolError where one of the known manifests, hash to run, is another one for the same run."""
    others = [name for name, run_id in known.items() if run_id == manifest.run_id and name != manifest.hash]
    if others:
        raise ProtocolError(
            f"this device knows run {manifest.run_id!r} by the manifest {others[0][:12]}, got {manifest.hash[:12]}: a run has "
            "one manifest; a changed one is another run, with another run_id"
        )


def check_room(manifest: Manifest, receipts: Sequence[Receipt], limits: LifetimeLimits) -> None:
    """Raise PrivacyBudgetError where not even one contribution to the run fits in the device's lifetime limit."""
    for unit in manifest.release.units:
        try:
            device_ledger.check_lifetime(past(receipts, unit.unit), accounting.event_of(unit, manifest), 1, limits)
        except PrivacyBudgetError as error:
            raise PrivacyBudgetError(
                f"no room for even one contribution to run {manifest.run_id!r}: {error}"
            ) from error


def past(receipts: Sequence[Receipt], unit: Unit) -> list[tuple[PrivacyEvent, int]]:
    """All that a device released about one kind of unit, as the accountant takes it."""
    return list(Counter(event for one in receipts for event in one.events if event.unit == unit).items())
