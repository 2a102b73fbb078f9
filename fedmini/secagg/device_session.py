"""One device's side of one session: five requests in, five answers out, and then nothing."""

from collections.abc import Callable
from dataclasses import replace
from typing import NoReturn, Protocol

import numpy as np

from fedmini import vectors
from fedmini.errors import DealerError, FedMiniError, ProtocolError, UpdateError
from fedmini.secagg import bindings, checks, keys, masks, shamir, wire
from fedmini.secagg.bindings import Secrets
from fedmini.secagg.checks import Agreed
from fedmini.secagg.messages import (
    Advert,
    Agreement,
    Answer,
    Context,
    Invitation,
    KeyList,
    MaskedVector,
    Outcome,
    Request,
    Revealed,
    SealedShares,
    Stage,
    Unmasking,
    Work,
)
from fedmini.secagg.shamir import Random
from fedmini.secagg.trust import Identity
from fedmini.types import DeviceId, Residues


class Owner(Protocol):
    """Whom a session works for: a device that decides whether to take part, and has something to contribute."""

    def admit(self, context: Context) -> None:
        """Raise a FedMiniError unless this device has never taken part in this attempt, or a later one, before."""

    def contribute(self, context: Context, model: bytes) -> Residues:
        """Pay for the release, then compute what is contributed: shape (num_coordinates,), uint32.

        It is called once, when the roster is fixed and every check has passed. What was paid stays paid.
        """


class DeviceSession:
    """The device's state machine: `step` turns each request into its answer.

    Anything wrong with a request raises ProtocolError, and the session is over: its secrets are erased, and nothing
    more leaves the device. `random` gives the keys and the shares; in production it is os.urandom.
    """

    __slots__ = (
        "_adverts",
        "_agreed",
        "_context",
        "_digest",
        "_held",
        "_holders",
        "_identity",
        "_least",
        "_outcome",
        "_owner",
        "_random",
        "_secrets",
        "_stage",
        "_threshold",
    )

    def __init__(self, identity: Identity, agreed: Agreed, owner: Owner, random: Random) -> None:
        self._identity, self._agreed, self._owner, self._random = identity, agreed, owner, random
        self._stage = Stage.ADVERTISE
        self._secrets = Secrets(random)
        self._held: dict[DeviceId, tuple[bytes, bytes]] = {}  # shares of each peer's seed and mask key
        self._context: Context | None = None
        self._digest = b""
        self._adverts: dict[DeviceId, Advert] = {}
        self._threshold = 0
        self._least = 0  # devices that must be left: enough for the threshold, and for the noise
        self._holders: tuple[DeviceId, ...] = ()
        self._outcome: Outcome | None = None

    def __repr__(self) -> str:
        return f"DeviceSession({self._agreed.device_id!r}, {self._stage.name})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a session holds secrets: it is never serialised")

    @property
    def stage(self) -> Stage:
        """The stage whose request comes next."""
        return self._stage

    @property
    def agreed(self) -> Agreed:
        """What this device agreed to, with the newest list of revoked devices: to be kept for the next session."""
        return self._agreed

    def step(self, request: bytes) -> bytes:
        """The answer to a request. Raises ProtocolError where the server breaks a rule; the session is over then."""
        failure: FedMiniError
        try:
            return self._answer(request)
        except UpdateError as error:
            failure = ProtocolError(f"a request can't be used: {error}")
        except FedMiniError as error:
            failure = error
        except BaseException:
            self.close()
            raise
        self.close()
        raise _without_frames(failure)

    def _answer(self, request: bytes) -> bytes:
        message = wire.decode_request(request, self._max_request_bytes())
        stage, answer = self._answerers()[type(message)]
        checks.stage(self._stage, stage)
        self._stage = Stage(stage + 1)  # before it is answered: nothing that comes meanwhile is answered as well
        answered = wire.encode(answer(message))
        if stage is Stage.UNMASK:
            self.close()
        elif self._stage is Stage.DONE:
            raise ProtocolError("the session was closed while it answered")
        return answered

    def close(self) -> None:
        """End the session, whatever its stage: erase every secret. Closing twice is fine."""
        self._stage = Stage.DONE
        self._secrets.erase()
        self._held, self._adverts, self._holders, self._outcome = {}, {}, (), None

    def _answerers(self) -> dict[type[Request], tuple[Stage, Callable[..., Answer]]]:
        return {
            Invitation: (Stage.ADVERTISE, self._advertise),
            KeyList: (Stage.SHARE, self._share),
            Work: (Stage.CONTRIBUTE, self._contribute),
            Outcome: (Stage.AGREE, self._agree),
            Unmasking: (Stage.UNMASK, self._reveal),
        }

    def _max_request_bytes(self) -> int:
        return wire.max_request_bytes(4 * vectors.num_parameters(self._agreed.manifest.template))

    def _advertise(self, invitation: Invitation) -> Advert:
        context = invitation.context
        checks.manifest(context, self._agreed)
        checks.invited(context, self._agreed)
        self._owner.admit(context)
        self._context, self._digest = context, context.digest
        own = self._agreed.device_id
        mask_key, share_key = self._secrets.mask_key.public(), self._secrets.share_key.public()
        signature = self._identity.sign("advert", self._digest, own, mask_key, share_key)
        advert = Advert(self._digest, own, mask_key, share_key, self._identity.certificate, signature)
        self._adverts = {own: advert}
        return advert

    def _share(self, key_list: KeyList) -> SealedShares:
        assert self._context is not None
        adverts, own = key_list.adverts, self._agreed.device_id
        checks.session(self._digest, key_list.session)
        checks.cohort_size(len(adverts), self._agreed)
        checks.threshold(key_list.threshold, len(adverts))
        checks.roster(adverts, self._adverts[own], self._context)
        checks.distinct_keys(adverts)
        checks.key_order(adverts)
        trust = checks.revocations(key_list.revocations, self._agreed.trust)
        self._agreed = replace(self._agreed, trust=trust)
        checks.certificates(adverts, trust)
        checks.advert_signatures(adverts, self._digest)
        self._digest = key_list.digest
        self._adverts = {advert.sender: advert for advert in adverts}
        self._threshold = key_list.threshold
        self._least = max(key_list.threshold, self._agreed.manifest.release.min_survivors)
        return self._deal()

    def _deal(self) -> SealedShares:
        """A share of the seed and one of the mask key for every device on the list, the own ones kept."""
        own, secrets = self._agreed.device_id, self._secrets
        seed_shares = shamir.split(secrets.seed, len(self._adverts), self._threshold, self._random)
        key_shares = shamir.split(secrets.mask_key.scalar, len(self._adverts), self._threshold, self._random)
        commitments, sealed = [], []
        for peer, pair in zip(self._adverts, zip(seed_shares, key_shares, strict=True), strict=True):
            commitments.append(bindings.commit_shares(self._digest, own, peer, pair))
            if peer == own:
                self._held[own] = pair
                continue
            key = bindings.sealing_key(self._secret_shared_with(peer), self._digest, own, peer)
            sealed.append((peer, keys.seal(key, b"".join(pair), bindings.sealed_about(self._digest, own, peer))))
        commitment = bindings.commit_seed(self._digest, own, secrets.seed)
        return SealedShares(self._digest, own, commitment, b"".join(commitments), tuple(sealed))

    def _contribute(self, work: Work) -> MaskedVector:
        assert self._context is not None
        own = self._agreed.device_id
        checks.session(self._digest, work.session)
        checks.model(work.model, self._context)
        checks.holders([own, *(dealer for dealer, _, _ in work.shares)], self._adverts, self._least)
        for dealer, sealed, commitments in work.shares:
            self._held[dealer] = self._open_share(dealer, sealed, commitments)
        self._holders = tuple(sorted(self._held))
        vector = self._owner.contribute(self._context, work.model)
        return MaskedVector(self._digest, own, self._mask(vector))

    def _open_share(self, dealer: DeviceId, sealed: bytes, commitments: bytes) -> tuple[bytes, bytes]:
        own = self._agreed.device_id
        key = bindings.sealing_key(self._secret_shared_with(dealer), self._digest, dealer, own)
        try:
            content = keys.unseal(key, sealed, bindings.sealed_about(self._digest, dealer, own))
        except ProtocolError as error:
            raise DealerError(f"{dealer}: {error}", dealer) from error
        pair = (content[: shamir.SHARE_BYTES], content[shamir.SHARE_BYTES :])
        checks.share_commitments(dealer, pair, bindings.commit_shares(self._digest, dealer, own, pair), commitments)
        return pair

    def _secret_shared_with(self, peer: DeviceId) -> bytes:
        return self._secrets.share_key.agree(self._adverts[peer].share_key)

    def _mask(self, vector: Residues) -> bytes:
        """The vector under its own mask and, for each peer, one that the peer's takes away again; packed."""
        manifest, own = self._agreed.manifest, self._agreed.device_id
        if vector.shape != (manifest.num_coordinates,) or vector.dtype != np.uint32:
            raise ProtocolError(f"expected a contribution of {manifest.num_coordinates} uint32 coordinates")
        added: list[bytes] = [bindings.seed_mask_key(self._secrets.seed, self._digest)]
        subtracted: list[bytes] = []
        for peer in self._holders:
            if peer != own:
                secret = self._secrets.mask_key.agree(self._adverts[peer].mask_key)
                (added if own < peer else subtracted).append(bindings.pair_mask_key(secret, self._digest, own, peer))
        self._secrets.erase()  # only shares of the peers' secrets are needed from here on
        return masks.mask_and_pack(vector, added, subtracted, manifest.release.modulus_bits)

    def _agree(self, outcome: Outcome) -> Agreement:
        own = self._agreed.device_id
        checks.session(self._digest, outcome.session)
        checks.partition(outcome.survivors, outcome.dropped, self._holders, own)
        checks.enough_survivors(len(outcome.survivors), self._least)
        self._outcome = outcome
        signature = self._identity.sign("survivors", self._digest, list(outcome.survivors), list(outcome.dropped))
        return Agreement(self._digest, own, signature)

    def _reveal(self, unmasking: Unmasking) -> Revealed:
        assert self._outcome is not None
        outcome = self._outcome
        checks.session(self._digest, unmasking.session)
        device_keys = {device: advert.certificate.device_key for device, advert in self._adverts.items()}
        told = (self._digest, list(outcome.survivors), list(outcome.dropped))
        checks.agreements(dict(unmasking.agreements), told, device_keys, self._threshold)
        return Revealed(
            self._digest,
            self._agreed.device_id,
            tuple((device, self._held[device][0]) for device in outcome.survivors),
            tuple((device, self._held[device][1]) for device in outcome.dropped),
        )


def _without_frames(error: FedMiniError) -> FedMiniError:
    """The error without the frames it came through, whose local variables hold secrets; its text says all there is."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)
