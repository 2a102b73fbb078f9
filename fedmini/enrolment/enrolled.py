"""An enrolled device: it follows its operator, agrees to manifests, and takes part, and remembers all of it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedmini import config as configuration
from fedmini import files, floors
from fedmini.config import DeviceConfig
from fedmini.enrolment import agreement, records
from fedmini.enrolment.records import Believed
from fedmini.errors import ProtocolError, StateError
from fedmini.floors import Limits
from fedmini.member import Member, OwnLedger
from fedmini.operator_keys import key_files
from fedmini.privacy import accounting
from fedmini.privacy.device_ledger import DeviceLedger, LifetimeLimits
from fedmini.secagg import signed_manifest, trust_text
from fedmini.secagg.checks import Agreed
from fedmini.secagg.device_keys import LoginKey
from fedmini.secagg.rotation import Rotation
from fedmini.secagg.signed_manifest import SignedManifest
from fedmini.secagg.trust import Certificate, Identity, Revocations, Trust
from fedmini.types import Contribution, Manifest, TrainTask, UnitPlan


class Enrolment:
    """A device's open folder; `opened` makes it. Its repr shows no key.

    Guarantee: what a method has accepted is on the disk when it returns, and a kill in the middle leaves all of it or
    nothing. Where the disk refuses, the folder is closed: what it holds is found out by opening it again.
    """

    __slots__ = (
        "_believed",
        "_is_open",
        "_manifests",
        "_withdrawn",
        "folder",
        "identity",
        "lifetime",
        "limits",
        "login_key",
    )

    def __init__(self, folder: Path, config: DeviceConfig | None = None) -> None:
        """`config` stands in the place of the folder's device.toml."""
        self.folder = folder
        self._is_open = True
        if config is None:
            path = folder / records.CONFIG
            config = configuration.load_device_config(path) if path.exists() else DeviceConfig()
        self.limits: Limits = floors.tighten(floors.COMPILED, config.floors)
        self.lifetime = LifetimeLimits(config.device.lifetime_epsilon, config.device.lifetime_delta)
        device_key = records.read_device_key(folder)
        self._believed = records.read_believed(folder)
        self.login_key: LoginKey = records.read_login_key(folder, device_key)
        certificate = records.read_certificate(folder, device_key, self._believed)
        self.identity: Identity = records.read_identity(folder, certificate)
        self._manifests = records.read_manifests(folder, self._believed, records.ACCEPTED)
        self._withdrawn = records.read_manifests(folder, self._believed, records.WITHDRAWN)
        with self.ledger():
            pass

    def __repr__(self) -> str:
        return f"Enrolment({str(self.folder)!r}, {self.identity.certificate.device_id!r})"

    @property
    def believed(self) -> Believed:
        """Whom this device believes, and by which rotations. Raises StateError once the folder is closed."""
        self._check_open()
        return self._believed

    @property
    def trust(self) -> Trust:
        """The operator key that this device relies on now, and the newest revocations that it has seen."""
        return self.believed.trust

    @property
    def manifests(self) -> Mapping[str, Manifest]:
        """What it agreed to and has not withdrawn from, by hash."""
        return {name: signed.manifest for name, signed in self._manifests.items()}

    def ledger(self) -> DeviceLedger:
        """Its own ledger, open, to be closed again soon: a contribution needs it. Raises StateError."""
        path = self.folder / records.LEDGER
        if not path.exists():
            raise StateError(f"{path} is missing: {records.RESTORE_LEDGER}")
        return DeviceLedger.open(path)

    def epsilon_after(self, manifest: Manifest, unit: UnitPlan) -> float:
        """What one unit will have cost over all runs, at the lifetime delta, if this run asks for all that it may."""
        with self.ledger() as ledger:
            releases = agreement.past(ledger.releases(), unit.unit)
            for one in manifest.parts:
                if (own := one.release.plan_of(unit.unit)) is not None:
                    left = one.release.max_releases - ledger.num_participations(one.run_id)
                    releases.append((accounting.event_of(own, one), max(0, left)))
        return accounting.compose(releases, self.lifetime.lifetime_delta)

    def update(self, revocations: Revocations) -> None:
        """Keep a newer list of revocations; the same again is fine. Raises ProtocolError for an older or another one."""
        self.follow((), revocations)

    def follow(
        self,
        rotations: Sequence[Rotation],
        revocations: Revocations | None = None,
        certificate: Certificate | None = None,
    ) -> None:
        """Go on to the operator's current key, with what was signed anew with it: all of it, or none.

        `rotations` are all there were, or empty where there is nothing to follow. Raises ProtocolError where they lead
        back or to another branch, where the revocations are older than those seen, and where the certificate is not
        this device's by the current key. Until it has that, this device takes no part.
        """
        before = self.believed
        chain = tuple(rotations) or before.rotations
        agreement.check_extends(before.rotations, chain)
        keys = records.operator_keys(before.operator_keys[0], chain)
        after = Believed(keys, chain, before.trust.rotated(rotations, revocations))
        old = before.contents()
        contents = {name: new for name, new in after.contents().items() if new != old[name]}
        if certificate is not None:
            records.check_own(certificate, self.identity.certificate.device_key)
            after.trust.check_certificate(certificate)
            contents[records.CERTIFICATE] = trust_text.write_certificate(certificate)
        if contents:
            with self._closed_on_failure():
                records.commit(self.folder, contents)
                if certificate is not None:
                    self.identity = records.read_identity(self.folder, certificate)
        self._believed = after

    def check(self, signed: SignedManifest) -> None:
        """Raise a FedMiniError unless `accept` would take this manifest."""
        trust, manifest = self.trust, signed.manifest
        _check_enrolled(trust, self.identity.certificate)
        if self._manifests.get(manifest.hash) == signed:
            return
        signed_manifest.check_manifest(trust, signed)
        if manifest.hash in self._manifests:
            return
        with self.ledger() as ledger:
            receipts = ledger.releases()
        known = {name: one.manifest.run_id for name, one in (self._manifests | self._withdrawn).items()}
        agreement.check_run(manifest, known | {receipt.manifest_hash: receipt.run_id for receipt in receipts})
        if manifest.hash in self._withdrawn:
            raise ProtocolError(f"this device has left run {manifest.run_id!r}, for good: it is not joined again")
        floors.check(manifest, self.limits)
        agreement.check_room(manifest, receipts, self.lifetime)

    def accept(self, signed: SignedManifest) -> Manifest:
        """Agree to a run, once; the manifest. The same again is fine, also where it was signed anew.

        Raises ProtocolError where this device's certificate is revoked or not by the operator's current key, the operator
        whom it relies on now did not sign the manifest, it asks for newer revocations than were seen, is beyond the
        limits, or is another one for a run that is known already;
        PrivacyBudgetError where the lifetime limit leaves no room for even one contribution.
        """
        self.check(signed)
        name = signed.manifest.hash
        if self._manifests.get(name) != signed:
            with self._closed_on_failure():
                path = self.folder / records.MANIFESTS / f"{name}{records.ACCEPTED}"
                key_files.write_file(path, trust_text.write_signed_manifest(signed))
            self._manifests[name] = signed
        return signed.manifest

    def manifest(self, manifest_hash: str) -> Manifest:
        """The manifest that a task refers to. Raises ProtocolError for one that was never accepted, or withdrawn."""
        signed = self._manifests.get(manifest_hash)
        if signed is None:
            left = "has left that run" if manifest_hash in self._withdrawn else "never agreed to it"
            raise ProtocolError(f"expected a manifest that this device agreed to, got {manifest_hash:.12}: it {left}")
        return signed.manifest

    def withdraw(self, manifest_hash: str) -> None:
        """Leave a run, for good: what was spent in it stays spent. Raises ProtocolError where it was never joined."""
        self._check_open()
        self.manifest(manifest_hash)
        path = self.folder / records.MANIFESTS / f"{manifest_hash}{records.ACCEPTED}"
        with self._closed_on_failure():
            try:
                path.rename(path.with_suffix(records.WITHDRAWN))
                files.sync_folder(path.parent)
            except OSError as error:
                raise StateError(f"can't rename {path}: {error.strerror}; mend that, then do the same again") from error
        self._withdrawn[manifest_hash] = self._manifests.pop(manifest_hash)

    def member(
        self,
        manifest_hash: str,
        contribute: Callable[[TrainTask], Contribution],
        *,
        is_evaluation: bool = False,
        is_seeded: bool = False,
    ) -> Member:
        """Who answers a server's requests in this run, for as long as the folder is open. It debits this ledger.

        `is_evaluation`: in the run's evaluations, not in its training.
        `is_seeded`: in tests only, where what is contributed comes from a seed; the ledger says so.
        Raises ProtocolError where the run was never joined, has no evaluations, is beyond limits that its owner has made
        stricter since, or where this device's certificate is revoked or not by the operator's current key.
        """
        memory = _Memory(self, manifest_hash, self.identity.certificate, is_evaluation)
        memory.agreed()
        floors.check(self.manifest(manifest_hash), self.limits)
        ledger = OwnLedger(self.folder / records.LEDGER, self.lifetime, is_seeded)
        return Member(self.identity, memory, contribute, ledger)

    def close(self) -> None:
        """No member answers any more, and nothing is kept. Closing twice is fine."""
        self._is_open = False

    def _check_open(self) -> None:
        if not self._is_open:
            raise StateError(f"{self.folder} is closed: open it again")

    @contextmanager
    def _closed_on_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise


@dataclass(frozen=True, slots=True)
class _Memory:
    """What a member of one run asks its device's folder, and tells it."""

    enrolment: Enrolment
    manifest_hash: str
    certificate: Certificate
    is_evaluation: bool

    def agreed(self) -> Agreed:
        trust = self.enrolment.trust
        agreed_to = self.enrolment.manifest(self.manifest_hash)
        manifest = agreed_to.for_evaluation if self.is_evaluation else agreed_to
        if manifest is None:
            raise ProtocolError(
                f"run {agreed_to.run_id!r} has no evaluations on devices: its manifest says nothing of any"
            )
        _check_enrolled(trust, self.certificate)
        return Agreed(self.certificate.device_id, manifest, trust)

    def update(self, revocations: Revocations) -> None:
        self.enrolment.update(revocations)


def _check_enrolled(trust: Trust, certificate: Certificate) -> None:
    """Raise ProtocolError where the device's own certificate is revoked, or not by the operator's current key."""
    try:
        trust.check_certificate(certificate)
    except ProtocolError as error:
        raise ProtocolError(f"this device can't take part: {error}; {records.ASK_AGAIN}") from error
