"""A server that keeps no rule: it tells each device what it likes, keeps every answer, and opens what it can by hand.

Nothing here uses ServerSession. What is opened is opened with the shares that devices revealed, with what corrupt
devices hand over, and with keys that the server made itself. Whether an attack worked is seen by comparing that with
the vector that was to stay secret.
"""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fedmini.errors import FedMiniError
from fedmini.secagg import bindings, checks, keys, masks, shamir, trust, wire
from fedmini.secagg.keys import SecretKey
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
    Unmasking,
    Work,
)
from fedmini.secagg.trust import Identity, Revocations
from fedmini.types import DeviceId, Residues
from tests.secagg.cohort import MODEL, Cohort

Kind = str  # of a share: "seed" or "key"

ANSWERS: Mapping[type[Request], type[Answer]] = {
    Invitation: Advert, KeyList: SealedShares, Work: MaskedVector, Outcome: Agreement, Unmasking: Revealed,
}  # fmt: skip


class Locked(Exception):
    """The server has not got what it needs to take a mask away."""


def believe(*_: object) -> None:
    """What stands in the place of a check that is switched off."""


def take_anything_for_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decrypt as AES-GCM does, in its counter mode, and look neither at the tag nor at what comes out."""

    def unseal(key: bytes, sealed: bytes, about: bytes) -> bytes:
        counter = keys.NONCE + (2).to_bytes(4, "big")
        return Cipher(algorithms.AES256(key), modes.CTR(counter)).decryptor().update(sealed[: -keys.TAG_BYTES])

    assert unseal(bytes(32), keys.seal(bytes(32), b"content", b""), b"") == b"content"
    monkeypatch.setattr(keys, "unseal", unseal)
    monkeypatch.setattr(checks, "share_commitments", believe)
    monkeypatch.setattr(shamir, "is_share", lambda share: True)


class Puppet:
    """A device that is none: the server made its keys, and so knows all that is meant for it."""

    def __init__(self, device: DeviceId, identity: Identity | None = None) -> None:
        self.device = device
        self.identity = identity or invented(device)
        self.mask_key, self.share_key = SecretKey.draw(os.urandom), SecretKey.draw(os.urandom)

    def advert(self, session: bytes) -> Advert:
        """Its keys, signed as a device signs them."""
        public = (self.mask_key.public(), self.share_key.public())
        signature = self.identity.sign("advert", session, self.device, *public)
        return Advert(session, self.device, *public, self.identity.certificate, signature)


def invented(device: DeviceId) -> Identity:
    """A signing key with a certificate by somebody who is not the operator."""
    key = Ed25519PrivateKey.generate()
    return Identity(key, trust.certify(Ed25519PrivateKey.generate(), device, key.public_key().public_bytes_raw()))


class LyingServer:
    """Holds one session with each device of a cohort, stage by stage; each may be told something else.

    `corrupt` devices follow the protocol, and give the server all that they know: their keys, the shares that they hold,
    and their signature under whatever it wants. A device that refuses is in `refusals`, and is not asked again.
    """

    def __init__(self, cohort: Cohort, corrupt: Sequence[DeviceId] = ()) -> None:
        self.cohort, self.corrupt = cohort, tuple(corrupt)
        self.contexts: dict[DeviceId, Context] = {}
        self.adverts: dict[DeviceId, Advert] = {}
        self.lists: dict[DeviceId, KeyList] = {}  # as each device was shown it
        self.dealt: dict[DeviceId, SealedShares] = {}
        self.holders: dict[DeviceId, tuple[DeviceId, ...]] = {}  # with whom each device has masks in common
        self.vectors: dict[DeviceId, bytes] = {}  # under their masks, packed
        self.outcomes: dict[DeviceId, Outcome] = {}
        self.agreements: dict[DeviceId, bytes] = {}
        self.mask_keys: dict[DeviceId, SecretKey] = {}  # of puppets, and of devices that gave theirs away
        self.seeds: dict[DeviceId, bytes] = {}
        self.shares: dict[tuple[Kind, DeviceId], dict[DeviceId, bytes]] = {}  # kind and dealer, then holder
        self.refusals: dict[DeviceId, FedMiniError] = {}

    # What it says to devices.

    def ask(self, device: DeviceId, request: Request) -> Answer | None:
        """The device's answer, or None where it refuses, or has refused before."""
        if device in self.refusals:
            return None
        try:
            answer = self.cohort.sessions[device].step(wire.encode(request))
        except FedMiniError as error:
            self.refusals[device] = error
            return None
        found: Answer = wire.decode(answer, ANSWERS[type(request)], 2**30)
        return found

    def invite(
        self, devices: Collection[DeviceId] | None = None, contexts: Mapping[DeviceId, Context] | None = None
    ) -> None:
        """Stage 0, in the cohort's own context or in another one."""
        for device in devices if devices is not None else self.cohort.devices:
            self.contexts[device] = (contexts or {}).get(device, self.cohort.context)
            advert = self.ask(device, Invitation(self.contexts[device]))
            if isinstance(advert, Advert):
                self.adverts[device] = advert
            if device in self.corrupt:
                secrets = self.cohort.sessions[device]._secrets
                self.mask_keys[device] = SecretKey(secrets.mask_key.scalar)
                self.seeds[device] = bytes(secrets.seed)

    def key_list(
        self, adverts: Collection[Advert] | None = None, threshold: int | None = None,
        revocations: Revocations | None = None,
    ) -> KeyList:  # fmt: skip
        """A list of keys: of all that were sent, and with the threshold that a device expects, if nothing else is said."""
        found = sorted(self.adverts.values() if adverts is None else adverts, key=lambda advert: advert.sender)
        threshold = checks.lowest_threshold(len(found)) if threshold is None else threshold
        return KeyList(self.cohort.context.digest, threshold, tuple(found), revocations)

    def with_keys(self, changed: Mapping[DeviceId, Advert]) -> KeyList:
        """The list of keys with other adverts in the place of some."""
        return self.key_list((self.adverts | changed).values())

    def show(self, lists: Mapping[DeviceId, KeyList] | None = None) -> None:
        """Stage 1: to each device its list of keys."""
        lists = dict.fromkeys(self.adverts, self.key_list()) if lists is None else lists
        for device, key_list in lists.items():
            key_list = replace(key_list, session=self.contexts[device].digest)
            dealt = self.ask(device, key_list)
            if isinstance(dealt, SealedShares):
                self.lists[device] = key_list
                self.dealt[device] = dealt

    def sealed(self, dealer: DeviceId, holder: DeviceId) -> tuple[DeviceId, bytes, bytes]:
        """What a dealer sealed for a holder, with the commitments to it: an entry of Work."""
        place = self._index(dealer, holder) - 1
        size = bindings.COMMITMENTS_BYTES
        commitments = self.dealt[dealer].share_commitments[size * place : size * (place + 1)]
        return dealer, dict(self.dealt[dealer].sealed)[holder], commitments

    def hand_out(
        self, dealers: Mapping[DeviceId, Collection[DeviceId]] | None = None,
        change: Callable[[DeviceId, Work], Work] = lambda device, work: work,
    ) -> None:  # fmt: skip
        """Stage 2: to each device what some dealers sealed for it; everybody's, if nothing is said."""
        for device, found in (dealers or dict.fromkeys(self.dealt, tuple(self.dealt))).items():
            shares = tuple(self.sealed(peer, device) for peer in sorted(set(found) - {device}))
            work = Work(session=self.session(device), shares=shares, model=MODEL)
            self.take_vector(device, change(device, work))

    def take_vector(self, device: DeviceId, work: Work) -> None:
        """Stage 2 for one device."""
        answer = self.ask(device, work)
        if isinstance(answer, MaskedVector):
            self.vectors[device] = answer.packed
            self.holders[device] = tuple(sorted({device, *(dealer for dealer, _, _ in work.shares)}))
        if device in self.corrupt:
            self._take_shares(device, self.cohort.sessions[device]._held)

    def tell(self, survivors: Mapping[DeviceId, Collection[DeviceId]] | None = None) -> None:
        """Stage 3: to each device the survivors; the others that it holds shares of are said to have dropped."""
        for device, alive in (survivors or dict.fromkeys(self.vectors, tuple(self.vectors))).items():
            dropped = set(self.holders.get(device, ())) - set(alive)
            self.tell_outcome(device, Outcome(self.session(device), tuple(sorted(alive)), tuple(sorted(dropped))))

    def tell_outcome(self, device: DeviceId, outcome: Outcome) -> bytes | None:
        """Stage 3 for one device: its signature, if it gives one."""
        answer = self.ask(device, outcome)
        if not isinstance(answer, Agreement):
            return None
        self.outcomes[device] = outcome
        self.agreements[device] = answer.signature
        return answer.signature

    def unmask(self, devices: Collection[DeviceId] | None = None) -> None:
        """Stage 4: to each device all signatures that there are under what it was told, those of corrupt devices too."""
        for device in tuple(self.outcomes) if devices is None else devices:
            outcome = self.outcomes[device]
            told = (outcome.session, list(outcome.survivors), list(outcome.dropped))
            signed = {peer: self.agreements[peer] for peer, other in self.outcomes.items() if other == outcome}
            signed |= {peer: self.cohort.identities[peer].sign("survivors", *told) for peer in self.corrupt}
            self.ask_to_reveal(device, signed)

    def ask_to_reveal(self, device: DeviceId, signed: Mapping[DeviceId, bytes]) -> None:
        """Stage 4 for one device."""
        answer = self.ask(device, Unmasking(self.session(device), tuple(sorted(signed.items()))))
        if isinstance(answer, Revealed):
            for dealer, share in answer.seed_shares:
                self.shares.setdefault(("seed", dealer), {})[device] = share
            for dealer, share in answer.key_shares:
                self.shares.setdefault(("key", dealer), {})[device] = share

    def play(self, victim: DeviceId, puppets: Sequence[Puppet]) -> None:
        """From stage 2 on, with a victim that was shown the puppets' keys as those of its peers."""
        if victim not in self.dealt:
            return
        for puppet in puppets:
            secret = puppet.share_key.agree(self.adverts[victim].share_key)
            self.open_sealed(victim, puppet.device, secret)
            self.mask_keys[puppet.device] = puppet.mask_key
        shares = tuple(self.seal_for(puppet, victim) for puppet in puppets)
        self.take_vector(victim, Work(session=self.session(victim), model=MODEL, shares=shares))

    # What it computes by itself.

    def seal_for(self, puppet: Puppet, holder: DeviceId) -> tuple[DeviceId, bytes, bytes]:
        """Shares from a puppet that a device will take for good: an entry of Work."""
        session, pair = self.session(holder), (bytes(32), bytes(32))
        key = bindings.sealing_key(
            puppet.share_key.agree(self.adverts[holder].share_key), session, puppet.device, holder
        )
        about = bindings.sealed_about(session, puppet.device, holder)
        commitments = bindings.commit_shares(session, puppet.device, holder, pair)
        return puppet.device, keys.seal(key, b"".join(pair), about), commitments

    def open_sealed(self, dealer: DeviceId, holder: DeviceId, secret: bytes) -> None:
        """Take a dealer's shares for a holder, with the secret that their share keys have in common."""
        session = self.session(dealer)
        key = bindings.sealing_key(secret, session, dealer, holder)
        content = keys.unseal(key, self.sealed(dealer, holder)[1], bindings.sealed_about(session, dealer, holder))
        self._take_shares(holder, {dealer: (content[: shamir.SHARE_BYTES], content[shamir.SHARE_BYTES :])})

    def secret(self, kind: Kind, dealer: DeviceId) -> bytes:
        """A dealer's secret from the shares of it that are known. Raises Locked where they are too few."""
        shares = {self._index(dealer, holder): share for holder, share in self.shares.get((kind, dealer), {}).items()}
        threshold = self.lists[dealer].threshold if dealer in self.lists else len(self.cohort.devices)
        if len(shares) < threshold:
            raise Locked(f"{len(shares)} shares of {dealer}'s {kind} are known, {threshold} are needed")
        chosen = dict(list(shares.items())[:threshold])
        return bytes(shamir.combine(chosen, shamir.weights(tuple(chosen))))

    def open(self, *devices: DeviceId, cancelling: Collection[DeviceId] = ()) -> Residues:
        """The sum of these devices' vectors alone, in clear. Raises Locked where a mask can't be taken away.

        `cancelling`: peers whose masks in each of these vectors take each other away.
        """
        total: Residues = np.zeros(self.cohort.manifest.num_coordinates, np.uint32)
        bits = self.cohort.manifest.release.modulus_bits
        for device in devices:
            if device not in self.vectors:
                raise Locked(f"the vector of {device} never left it")
            masks.add_packed(total, self.vectors[device], bits)
            own = bindings.seed_mask_key(self._seed(device), self.session(device))
            masks.add_mask(total, own, subtract=True)
            for peer in set(self.holders[device]) - {*devices, *cancelling}:
                masks.add_mask(total, self._pair_mask(device, peer), subtract=device < peer)
        return masks.reduce(total, bits)

    def _pair_mask(self, device: DeviceId, peer: DeviceId) -> bytes:
        """The key of the mask that a device has in common with a peer, from the peer's secret or from its own."""
        try:
            secret = self._mask_key(peer).agree(self.adverts[device].mask_key)
        except Locked:
            secret = self._mask_key(device).agree(self.adverts[peer].mask_key)
        return bindings.pair_mask_key(secret, self.session(device), device, peer)

    def _seed(self, device: DeviceId) -> bytes:
        return self.seeds[device] if device in self.seeds else self.secret("seed", device)

    def _mask_key(self, device: DeviceId) -> SecretKey:
        return self.mask_keys[device] if device in self.mask_keys else SecretKey(self.secret("key", device))

    def _take_shares(self, holder: DeviceId, held: Mapping[DeviceId, tuple[bytes, bytes]]) -> None:
        for dealer, (seed_share, key_share) in held.items():
            self.shares.setdefault(("seed", dealer), {})[holder] = seed_share
            self.shares.setdefault(("key", dealer), {})[holder] = key_share

    def _index(self, dealer: DeviceId, holder: DeviceId) -> int:
        """Where a holder stands on the list that the dealer was shown, from 1."""
        return [advert.sender for advert in self.lists[dealer].adverts].index(holder) + 1

    def session(self, device: DeviceId) -> bytes:
        """What the stages after its list of keys are about, for a device."""
        return self.lists[device].digest if device in self.lists else self.contexts[device].digest
