"""What a device agreed to, and what it was offered: consent is asked for, and never assumed."""

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from fedmini import enrolment, files
from fedmini.config import DeviceConfig
from fedmini.data import Example
from fedmini.device import participation
from fedmini.device.examples import Examples
from fedmini.device.participation import Means, Participation
from fedmini.device.standing import OfferedRun, RunStatus
from fedmini.enrolment import Enrolment, bargain, records
from fedmini.errors import ConditionsError, ConfigError, ProtocolError, StateError, UpdateError
from fedmini.offer import Offer
from fedmini.secagg import signing_keys, trust_text
from fedmini.secagg.signed_manifest import SignedManifest
from fedmini.store import StoredExample
from fedmini.types import EncodedExample, Manifest

OFFERS = "offers"
MAX_OFFERS = 32
NO_EXAMPLE = "this device has no example to train on yet: add some"


class Membership:
    """A device's folder, once it is enrolled: what it agreed to, and the runs that it is ready for.

    Safe from several threads; only the worker's asks for a `Participation`.
    """

    def __init__(self, folder: Path, config: DeviceConfig, examples: Examples) -> None:
        self._folder, self._config, self._examples = folder, config, examples
        self._lock = threading.RLock()
        self._opened = ExitStack()
        self._enrolment: Enrolment | None = None
        self._ready: dict[str, Participation] = {}
        self._offers: dict[str, SignedManifest] = {}
        self._open()

    def __repr__(self) -> str:
        return f"Membership({str(self._folder)!r})"

    @property
    def enrolment(self) -> Enrolment | None:
        """The enrolled device's folder; None before the enrolment."""
        return self._enrolment

    def enrolled(self) -> Enrolment:
        """The same. Raises ConfigError before the enrolment."""
        if self._enrolment is None:
            raise ConfigError("this device is not enrolled: give its device.pub to an operator, then call `enrol`")
        return self._enrolment

    def enrol(self, certificate: bytes, operator_key: bytes) -> None:
        """Take the operator's certificate. Raises a FedMiniError as `fedmini device enrol` does; nothing has changed then."""
        try:
            found, key = trust_text.read_certificate(certificate), signing_keys.read_public(operator_key)
        except UpdateError as error:
            raise ConfigError(str(error)) from None
        with self._lock:
            self.close()
            try:
                enrolment.enrol(self._folder, found, key)
            finally:
                self._open()

    def _open(self) -> None:
        if records.is_enrolled(self._folder):
            self._enrolment = self._opened.enter_context(enrolment.opened(self._folder, self._config))
            self._offers = self._read_offers(self._enrolment)

    def close(self) -> None:
        """Give up every run that goes on, and let go of the folder. Closing twice is fine."""
        with self._lock:
            self.leave_rounds()
            self._enrolment = None
            self._opened.close()
            self._opened = ExitStack()

    def leave_rounds(self, means: Means | None = None) -> None:
        """Give up the rounds that go on, with these means where any are given; the models stay."""
        with self._lock:
            for ready in self._ready.values():
                if means is None or ready.means is means:
                    ready.close()

    def consider(self, offer: Offer) -> str | None:
        """Take what the operator has signed since, and say what stands against taking part: "consent", or nothing.

        Raises a FedMiniError where the run is none that this device could agree to.
        """
        with self._lock:
            own = self.enrolled()
            if offer.rotations or offer.revocations is not None:
                own.follow(offer.rotations, offer.revocations, offer.certificate if offer.rotations else None)
            name = offer.signed.manifest.hash
            own.check(offer.signed)
            if name in own.manifests or name in self._config.consent.manifests:
                own.accept(offer.signed)
                self._forget_offer(name)
                return None
            self._keep_offer(offer.signed)
            return "consent"

    def why_barred(self) -> str | None:
        """Why this device can't take part in anything; None where it is enrolled, and not revoked."""
        with self._lock:
            own = self._enrolment
            if own is None:
                return "it is not enrolled: give its device.pub to an operator"
            newest = own.trust.revocations
            if newest is not None and own.identity.certificate.device_key in newest.device_keys:
                return "its operator has revoked it, for good: to take part again, make another folder and be enrolled anew"
            return None

    def runs(self) -> tuple[RunStatus, ...]:
        """The runs that this device agreed to."""
        with self._lock:
            own = self._enrolment
            if own is None:
                return ()
            with own.ledger() as ledger:
                return tuple(
                    RunStatus(one.run_id, name, ledger.num_participations(one.run_id), one.release.max_releases)
                    for name, one in own.manifests.items()
                )

    def offers(self) -> tuple[OfferedRun, ...]:
        """The runs that wait for consent."""
        with self._lock:
            own = self._enrolment
            if own is None:
                return ()
            return tuple(
                OfferedRun(one.manifest.run_id, name, tuple(bargain.describe(one.manifest, own)))
                for name, one in self._offers.items()
            )

    def consent(self, manifest_hash: str) -> None:
        """Agree to a run that was offered; the same again is fine. Raises ConfigError for one that never was."""
        with self._lock:
            own = self.enrolled()
            if manifest_hash in own.manifests:
                return
            if manifest_hash not in self._offers:
                known = ", ".join(f"{name:.12}" for name in self._offers) or "none"
                raise ConfigError(f"no run with the manifest {manifest_hash:.12} was offered; offered: {known}")
            own.accept(self._offers[manifest_hash])
            self._forget_offer(manifest_hash)

    def withdraw(self, manifest_hash: str) -> None:
        """Leave a run for good. Raises ProtocolError where it was never joined."""
        with self._lock:
            own = self.enrolled()
            run_id = own.manifest(manifest_hash).run_id
            own.withdraw(manifest_hash)
            if manifest_hash in self._ready:
                self._ready.pop(manifest_hash).close()
            self._examples.thaw(run_id)

    def ready(self, manifest_hash: str, means: Means) -> Participation:
        """The run, ready to answer for: its examples are frozen at the first time, and its model is loaded.

        Raises a FedMiniError where this device never agreed to it, or can't take part: ConditionsError where it has no
        example that can be trained on.
        """
        with self._lock:
            own = self.enrolled()
            manifest = own.manifest(manifest_hash)
            known = self._ready.get(manifest_hash)
            if known is not None and known.enrolment is own and known.means is means:
                return known
            for other in self._ready.values():
                other.close()
            self._ready = {}  # one model in memory

        def read_examples() -> tuple[EncodedExample, ...]:
            return self._frozen(own, manifest, means)

        read_examples()
        ready = Participation(own, manifest, read_examples, means)
        with self._lock:
            own.manifest(manifest_hash)  # its owner may have left it meanwhile
            # Loading takes long: a worker that was given up meanwhile must not take the place of the next one's.
            if own is self._enrolment and not means.interruption.is_stopped:
                self._ready = {manifest_hash: ready}
        return ready

    def _frozen(self, own: Enrolment, manifest: Manifest, means: Means) -> tuple[EncodedExample, ...]:
        """What is left of the run's frozen examples, as tokens.

        A set that began empty would stay so. So none is frozen before one of it can be trained on, and one of which
        nothing can be, and nothing ever left, is let go.
        """
        encoder = means.base.encoder(manifest.local.max_length)
        most = participation.max_examples(manifest, self._config.training.max_examples)
        if all(encoder.encode(_plain(one)) is None for one in reversed(self._examples.newest(most))):
            raise ConditionsError(NO_EXAMPLE)
        encoded = encoder.encode_all([_plain(one) for one in self._examples.freeze(manifest.run_id, most)])
        if encoded:
            return encoded
        with own.ledger() as ledger:
            is_new = ledger.num_participations(manifest.run_id) == 0
        if is_new:
            self._examples.thaw(manifest.run_id)
        raise ConditionsError(NO_EXAMPLE)

    def forget(self) -> None:
        """Let go of everything that was made of the examples."""
        with self._lock:
            self.leave_rounds()
            self._ready = {}

    def _keep_offer(self, signed: SignedManifest) -> None:
        name = signed.manifest.hash
        if self._offers.get(name) == signed:
            return
        place = self._folder / OFFERS
        try:
            place.mkdir(mode=0o700, exist_ok=True)
            files.replace_synced(place / f"{name}.json", trust_text.write_signed_manifest(signed), 0o600)
        except OSError as error:
            raise StateError(f"can't keep an offer in {place}: {error.strerror}; make room") from error
        self._offers[name] = signed
        for oldest in list(self._offers)[:-MAX_OFFERS]:
            self._forget_offer(oldest)

    def _forget_offer(self, name: str) -> None:
        self._offers.pop(name, None)
        with suppress(OSError):  # it stays, and is offered once more at the next start
            (self._folder / OFFERS / f"{name}.json").unlink(missing_ok=True)

    def _read_offers(self, own: Enrolment) -> dict[str, SignedManifest]:
        """The offers that still could be agreed to; a damaged one comes again from the server."""
        return _checked(own.check, sorted((self._folder / OFFERS).glob("*.json")))


def _plain(stored: StoredExample) -> Example:
    return Example(stored.prompt, stored.response)


def _checked(check: Callable[[SignedManifest], None], paths: Sequence[Path]) -> dict[str, SignedManifest]:
    found = {}
    for path in paths:
        try:
            signed = trust_text.read_signed_manifest(path.read_bytes())
            check(signed)
        except (OSError, UpdateError, ProtocolError):
            continue
        found[signed.manifest.hash] = signed
    return found
