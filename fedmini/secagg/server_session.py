"""The server's side of one session: it hands out requests, takes answers one at a time, and ends with a sum.

It holds one vector, to which masked vectors are added as they arrive, whatever the size of the cohort; there is no
place in it for the vector of one device.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from fedmini.errors import CohortError, ConfigError, FedMiniError, ProtocolError, UpdateError
from fedmini.secagg import bindings, checks, masks, wire
from fedmini.secagg.messages import (
    MAX_DEVICES,
    Advert,
    Agreement,
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
    hash_model,
)
from fedmini.secagg.trust import Trust
from fedmini.secagg.unmasking import Dealt, Opening
from fedmini.types import CohortSum, DeviceId, Manifest, Residues

Exchanged = Iterable[tuple[DeviceId, bytes]]
"""Devices and what is sent to them, or came from them, one at a time. Who a device is, its transport says."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """An answer that was not used, and why."""

    device: DeviceId
    stage: Stage
    reason: str


class ServerSession:
    """The server's state machine: `invite`, then `step` with the answers of each stage, until `stage` is DONE.

    An answer that can't be used is refused, noted in `refusals`, and costs its sender the round, never the others. Too
    few devices raise CohortError: up to the SHARE stage nothing has been asked for that costs privacy.
    """

    def __init__(self, manifest: Manifest, context: Context, model: bytes, trust: Trust) -> None:
        _check_start(manifest, context, model)
        self._manifest, self._context, self._model, self._trust = manifest, context, model, trust
        self._digest = context.digest
        self._stage = Stage.ADVERTISE
        self._taken: dict[DeviceId, bytes] = {}  # in this stage: from whom, and the hash of what
        self._adverts: dict[DeviceId, Advert] = {}
        self._threshold = 0
        self._dealt: dict[DeviceId, Dealt] = {}
        self._total: Residues = np.zeros(manifest.num_coordinates, np.uint32)
        self._outcome = Outcome(self._digest, (), ())
        self._agreements: dict[DeviceId, bytes] = {}
        self._opening: Opening | None = None
        self._refused: dict[tuple[DeviceId, Stage], Refusal] = {}  # the first of each device at each stage

    def __repr__(self) -> str:
        return f"ServerSession({self._context.run_id!r}, round {self._context.round_num}, {self._stage.name})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a session ends with its process: it is never serialised")

    @property
    def stage(self) -> Stage:
        """The stage whose answers come next."""
        return self._stage

    @property
    def roster(self) -> tuple[DeviceId, ...]:
        """The devices that this attempt is about, sorted: fixed, and to be debited, when the SHARE stage is over."""
        return tuple(sorted(self._dealt))

    @property
    def refusals(self) -> list[Refusal]:
        """Answers that were not used: the first of each device at each stage."""
        return list(self._refused.values())

    @property
    def cohort_sum(self) -> CohortSum:
        """What the session was for; only at its end."""
        if self._stage is not Stage.DONE:
            raise ConfigError(f"the session is at stage {self._stage.name}: there is no sum yet")
        return CohortSum(masks.reduce(self._total, self._manifest.release.modulus_bits), len(self._outcome.survivors))

    def invite(self) -> Iterator[tuple[DeviceId, bytes]]:
        """The first requests."""
        return self._same_for(self._context.invited, Invitation(self._context))

    def step(self, answers: Exchanged) -> Iterator[tuple[DeviceId, bytes]]:
        """Take the answers of this stage, as they come until its deadline, and give the next stage's requests.

        One answer and one request are in memory at a time. After the last stage there is nothing to send, and nothing
        more to take: ProtocolError.
        """
        if self._stage is Stage.DONE:
            raise ProtocolError("the session is over: begin another")
        take, close = self._stages()[self._stage]
        for device, answer in answers:
            try:
                self._take_once(device, answer, take)
            except FedMiniError as error:
                self._refused.setdefault((device, self._stage), Refusal(device, self._stage, str(error)))
        requests = close()
        self._taken = {}
        self._stage = Stage(self._stage + 1)
        return requests

    def _stages(self) -> dict[Stage, tuple[Callable[[DeviceId, bytes], None], Callable[[], "_Requests"]]]:
        return {
            Stage.ADVERTISE: (self._take_advert, self._close_adverts),
            Stage.SHARE: (self._take_shares, self._close_shares),
            Stage.CONTRIBUTE: (self._take_vector, self._close_vectors),
            Stage.AGREE: (self._take_agreement, self._close_agreements),
            Stage.UNMASK: (self._take_revealed, self._close_revealed),
        }

    def _take_once(self, device: DeviceId, answer: bytes, take: Callable[[DeviceId, bytes], None]) -> None:
        """The first answer that can be used counts; the same once more is fine, another is refused."""
        mark = hashlib.sha256(answer).digest()
        if device in self._taken:
            if self._taken[device] != mark:
                raise UpdateError("a second, different answer: the first one counts")
            return
        take(device, answer)
        self._taken[device] = mark

    def _take_advert(self, device: DeviceId, answer: bytes) -> None:
        advert = self._read(answer, Advert, device, self._context.invited)
        checks.certificates([advert], self._trust)
        checks.key_order([advert])
        checks.advert_signatures([advert], self._digest)
        checks.distinct_keys([*self._adverts.values(), advert])
        self._adverts[device] = advert

    def _close_adverts(self) -> "_Requests":
        num_devices = len(self._adverts)
        self._threshold = checks.lowest_threshold(num_devices)
        self._need(num_devices, "sent their keys", "nothing was spent")
        self._adverts = dict(sorted(self._adverts.items()))
        adverts = tuple(self._adverts.values())
        key_list = KeyList(self._digest, self._threshold, adverts, self._trust.revocations)
        self._digest = key_list.digest
        return self._same_for(self._adverts, key_list)

    def _take_shares(self, device: DeviceId, answer: bytes) -> None:
        shares = self._read(answer, SealedShares, device, self._adverts)
        peers = [peer for peer in self._adverts if peer != device]
        expected_bytes = len(self._adverts) * bindings.COMMITMENTS_BYTES
        if [peer for peer, _ in shares.sealed] != peers or len(shares.share_commitments) != expected_bytes:
            raise UpdateError("expected sealed shares for every peer on the list of keys, and commitments to them all")
        self._dealt[device] = Dealt(
            self._indices[device],
            shares.seed_commitment,
            shares.share_commitments,
            b"".join(sealed for _, sealed in shares.sealed),
        )

    def _close_shares(self) -> "_Requests":
        self._need(len(self._dealt), "shared their secrets", "nothing was spent")
        return self._works()

    def _works(self) -> "_Requests":
        """The requests for vectors, each made when it is sent."""
        roster = self.roster
        for device in roster:
            index = self._dealt[device].index
            found = tuple(
                (dealer, self._dealt[dealer].sealed_for(index), self._dealt[dealer].commitments_for(index))
                for dealer in roster
                if dealer != device
            )
            yield device, wire.encode(Work(self._digest, found, self._model))

    def _take_vector(self, device: DeviceId, answer: bytes) -> None:
        vector = self._read(answer, MaskedVector, device, self._dealt)
        masks.add_packed(self._total, vector.packed, self._manifest.release.modulus_bits)

    def _close_vectors(self) -> "_Requests":
        self._need(len(self._taken), "sent their vectors", "what was debited stays spent")
        survivors = tuple(sorted(self._taken))
        dropped = tuple(device for device in self.roster if device not in self._taken)
        self._outcome = Outcome(self._digest, survivors, dropped)
        self._opening = Opening(self._digest, self._dealt, self._indices, self._threshold)
        return self._same_for(survivors, self._outcome)

    def _take_agreement(self, device: DeviceId, answer: bytes) -> None:
        agreement = self._read(answer, Agreement, device, self._outcome.survivors)
        device_keys = {device: self._adverts[device].certificate.device_key}
        told = (self._digest, list(self._outcome.survivors), list(self._outcome.dropped))
        checks.agreements({device: agreement.signature}, told, device_keys, 1)
        self._agreements[device] = agreement.signature

    def _close_agreements(self) -> "_Requests":
        self._need_threshold(len(self._agreements), "agreed on who is in the sum")
        return self._same_for(
            sorted(self._agreements), Unmasking(self._digest, tuple(sorted(self._agreements.items())))
        )

    def _take_revealed(self, device: DeviceId, answer: bytes) -> None:
        assert self._opening is not None
        revealed = self._read(answer, Revealed, device, self._outcome.survivors)
        self._opening.add(revealed, self._outcome.survivors, self._outcome.dropped)

    def _close_revealed(self) -> "_Requests":
        assert self._opening is not None
        self._need_threshold(self._opening.num_holders, "revealed their shares")
        mask_keys = {device: advert.mask_key for device, advert in self._adverts.items()}
        self._opening.unmask(self._total, self._outcome.survivors, mask_keys)
        return iter(())

    @property
    def _indices(self) -> dict[DeviceId, int]:
        """Where each device on the list of keys stands in it, from 1: the index of the shares that it holds."""
        return {device: index for index, device in enumerate(self._adverts, 1)}

    def _read(
        self, answer: bytes, expected: type[wire.AnyAnswer], device: DeviceId, among: Iterable[DeviceId]
    ) -> wire.AnyAnswer:
        if device not in among:
            raise UpdateError(f"{device} is not asked at this stage")
        release = self._manifest.release
        most = wire.max_answer_bytes(self._manifest.num_coordinates, release.modulus_bits)
        message = wire.decode(answer, expected, most)
        if message.session != self._digest:
            raise UpdateError("an answer of another session")
        if message.sender != device:
            raise UpdateError(f"{device} answered for {message.sender}")
        return message

    def _same_for(self, devices: Iterable[DeviceId], request: Request) -> Iterator[tuple[DeviceId, bytes]]:
        content = wire.encode(request)
        return ((device, content) for device in tuple(devices))

    def _need(self, num_devices: int, what: str, spent: str) -> None:
        least = max(self._threshold, self._manifest.release.min_survivors)
        if num_devices < least:
            raise CohortError(f"{num_devices} devices {what}, {least} are needed; {spent}{self._why()}")

    def _need_threshold(self, num_devices: int, what: str) -> None:
        if num_devices < self._threshold:
            raise CohortError(
                f"{num_devices} devices {what}, {self._threshold} are needed; what was debited stays spent{self._why()}"
            )

    def _why(self) -> str:
        """The first refusals of this stage, for the operator."""
        found = [f"{refusal.device}: {refusal.reason}" for refusal in self.refusals if refusal.stage is self._stage]
        return f" (refused: {'; '.join(found[:3])})" if found else ""


_Requests = Iterator[tuple[DeviceId, bytes]]


def _check_start(manifest: Manifest, context: Context, model: bytes) -> None:
    """The server's own mistakes: what devices would refuse, it says before it asks them."""
    num_devices = len(context.invited)
    if num_devices > MAX_DEVICES:
        raise ConfigError(
            f"secure aggregation connects every device with every other, for at most {MAX_DEVICES} devices a round, "
            f"got {num_devices}: lower rounds.cohort_size or rounds.over_selection"
        )
    if list(context.invited) != sorted(set(context.invited)):
        raise ConfigError("expected the invited devices sorted, each once")
    if context.manifest_hash.hex() != manifest.hash or context.model_hash != hash_model(model):
        raise ConfigError("the session's context is about another manifest or model than it was given")
