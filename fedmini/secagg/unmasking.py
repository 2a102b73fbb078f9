"""From the shares that survivors reveal to the sum: each share checked, each secret checked, each mask taken away."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedmini.errors import CohortError, UpdateError
from fedmini.secagg import bindings, keys, masks, shamir
from fedmini.secagg.bindings import COMMITMENT_BYTES, COMMITMENTS_BYTES, SEALED_BYTES
from fedmini.secagg.keys import SecretKey
from fedmini.secagg.messages import Revealed
from fedmini.types import DeviceId, Residues


@dataclass(frozen=True, slots=True)
class Dealt:
    """What one device dealt: one block of bytes for all holders, by their index on the list of keys, from 1."""

    index: int  # the dealer's own
    seed_commitment: bytes
    share_commitments: bytes  # 64 for each device on the list
    sealed: bytes  # SEALED_BYTES for each but the dealer

    def sealed_for(self, index: int) -> bytes:
        """The sealed shares of the holder at this index."""
        place = index - 1 if index < self.index else index - 2
        return self.sealed[SEALED_BYTES * place : SEALED_BYTES * (place + 1)]

    def commitments_for(self, index: int) -> bytes:
        """The 64 bytes about the shares of the holder at this index."""
        return self.share_commitments[COMMITMENTS_BYTES * (index - 1) : COMMITMENTS_BYTES * index]


class Opening:
    """The shares that were revealed for one outcome, until there are enough of them to take the masks away.

    `indices`: of every device on the list of keys, from 1. What it collects belongs to one kind of share for each
    device: seeds of survivors, mask keys of those that dropped.
    """

    def __init__(
        self, session: bytes, dealt: Mapping[DeviceId, Dealt], indices: Mapping[DeviceId, int], threshold: int
    ) -> None:
        self._session, self._dealt, self._indices, self._threshold = session, dealt, indices, threshold
        self._shares: dict[DeviceId, dict[int, bytes]] = {}
        self._holders: list[int] = []

    def add(self, revealed: Revealed, survivors: Sequence[DeviceId], dropped: Sequence[DeviceId]) -> None:
        """Take one survivor's shares. Raises UpdateError, with nothing taken, where one is missing or wrong.

        A share is compared with what its dealer committed to, and its holder had checked when it got it: a wrong one
        names the holder.
        """
        for found, expected in ((revealed.seed_shares, survivors), (revealed.key_shares, dropped)):
            if [device for device, _ in found] != list(expected):
                raise UpdateError("expected one share of every survivor's seed and of every dropped device's key")
        for kind, found in (("seed", revealed.seed_shares), ("key", revealed.key_shares)):
            for dealer, share in found:
                self._check(kind, dealer, revealed.sender, share)
        if len(self._holders) < self._threshold:  # more would add nothing
            index = self._indices[revealed.sender]
            self._holders.append(index)
            for dealer, share in (*revealed.seed_shares, *revealed.key_shares):
                self._shares.setdefault(dealer, {})[index] = share

    def _check(self, kind: str, dealer: DeviceId, holder: DeviceId, share: bytes) -> None:
        both = self._dealt[dealer].commitments_for(self._indices[holder])
        committed = both[:COMMITMENT_BYTES] if kind == "seed" else both[COMMITMENT_BYTES:]
        if not shamir.is_share(share) or bindings.commit_share(self._session, dealer, holder, kind, share) != committed:
            raise UpdateError(f"{holder} revealed a share of {dealer} that is not the one it was dealt")

    @property
    def num_holders(self) -> int:
        """How many have revealed their shares, up to the threshold."""
        return len(self._holders)

    def unmask(self, total: Residues, survivors: Sequence[DeviceId], mask_keys: Mapping[DeviceId, bytes]) -> None:
        """Take every mask off the sum, in place. `mask_keys`: everybody's public ones.

        Raises CohortError, naming the dealer, where shares that are as they were dealt give another secret than the
        dealer committed to: its mask can't be taken off, and the round is lost.
        """
        coefficients = shamir.weights(self._holders)
        for dealer, shares in self._shares.items():
            secret = shamir.combine(shares, coefficients)
            if dealer in survivors:
                self._remove_own_mask(total, dealer, secret)
            else:
                self._remove_pair_masks(total, dealer, SecretKey(secret), survivors, mask_keys)
            keys.erase(secret)
        self._shares = {}

    def _remove_own_mask(self, total: Residues, dealer: DeviceId, seed: bytearray) -> None:
        if bindings.commit_seed(self._session, dealer, seed) != self._dealt[dealer].seed_commitment:
            raise CohortError(
                f"{dealer} dealt shares of another seed than it committed to: revoke it; the round is lost"
            )
        masks.add_mask(total, bindings.seed_mask_key(seed, self._session), subtract=True)

    def _remove_pair_masks(
        self,
        total: Residues,
        dealer: DeviceId,
        key: SecretKey,
        survivors: Sequence[DeviceId],
        mask_keys: Mapping[DeviceId, bytes],
    ) -> None:
        if key.public() != mask_keys[dealer]:
            raise CohortError(f"{dealer} dealt shares of another key than it advertised: revoke it; the round is lost")
        added: list[bytes] = []  # what the survivors had taken away, because they come after the dealer
        subtracted: list[bytes] = []
        for survivor in survivors:
            pair = bindings.pair_mask_key(key.agree(mask_keys[survivor]), self._session, dealer, survivor)
            (subtracted if survivor < dealer else added).append(pair)
        masks.add_masks(total, added, subtracted)
        key.erase()
