"""A device's side of every secure round of one run: requests in, answers out, its own ledger debited in between."""

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from fedmini import vectors
from fedmini.errors import ProtocolError
from fedmini.privacy import accounting
from fedmini.privacy.device_ledger import DeviceLedger, DeviceRelease, LifetimeLimits
from fedmini.secagg import wire
from fedmini.secagg.checks import Agreed
from fedmini.secagg.device_session import DeviceSession
from fedmini.secagg.messages import Context
from fedmini.secagg.shamir import Random
from fedmini.secagg.trust import Identity, Revocations
from fedmini.types import Contribution, Manifest, Residues, TrainTask


@dataclass(frozen=True, slots=True)
class OwnLedger:
    """Where a device writes down what leaves it, in this run and all others, and what all of them together may cost."""

    path: Path
    limits: LifetimeLimits
    is_seeded: bool = False  # in a seeded simulation: an attempt may come again with the same bits

    def admit(self, manifest: Manifest, context: Context) -> None:
        """Raise what `debit` would refuse this attempt with, before the run has spent anything on it."""
        with DeviceLedger.open(self.path) as ledger:
            ledger.check(self._release(manifest, context), self.limits)

    def debit(self, manifest: Manifest, context: Context) -> None:
        """Write down what is about to be contributed. Raises a FedMiniError, with nothing spent, where it may not be."""
        with DeviceLedger.open(self.path) as ledger:
            ledger.debit(self._release(manifest, context), self.limits)

    def _release(self, manifest: Manifest, context: Context) -> DeviceRelease:
        return DeviceRelease(
            run_id=context.run_id,
            round_num=context.round_num,
            attempt=context.attempt,
            manifest_hash=manifest.hash,
            events=tuple(accounting.event_of(unit, manifest) for unit in manifest.release.units),
            max_participations=manifest.release.max_releases,
            min_separation=manifest.release.min_separation,
            is_seeded=self.is_seeded,
        )


class Memory(Protocol):
    """What a device knows beyond one run: the newest that it has seen in any of them."""

    def agreed(self) -> Agreed:
        """What holds when a round begins. Raises a FedMiniError where this device takes part no longer."""

    def update(self, revocations: Revocations) -> None:
        """Keep a newer list, before the answer leaves that was given with it. Raises a FedMiniError."""


class ForThisProcess:
    """A memory that ends with the process."""

    def __init__(self, agreed: Agreed) -> None:
        self._agreed = agreed

    def agreed(self) -> Agreed:
        """What was given, with the newest revocations."""
        return self._agreed

    def update(self, revocations: Revocations) -> None:
        """Keep a newer list."""
        self._agreed = replace(self._agreed, trust=self._agreed.trust.updated(revocations))


class Member:
    """One device of a run. `contribute` computes what it gives to a task: `Contributor.contribute`, in the end.

    Without a ledger (a run without privacy) it keeps no record, and takes part in whatever it is asked for. One request
    at a time: another thread's is refused while one is answered.
    """

    def __init__(
        self,
        identity: Identity,
        memory: Memory,
        contribute: Callable[[TrainTask], Contribution],
        ledger: OwnLedger | None,
        random: Random = os.urandom,
    ) -> None:
        self._identity, self._memory, self._random = identity, memory, random
        self._contribute, self._ledger = contribute, ledger
        self._agreed = memory.agreed()
        self._session: DeviceSession | None = None
        self._answering = threading.Lock()

    def __repr__(self) -> str:
        return f"Member({self._agreed.device_id!r}, {self._session})"

    def answer(self, request: bytes) -> bytes:
        """The answer to one request of a round. An invitation ends whatever round went on and begins another.

        Raises a FedMiniError where this device takes no part, or the server breaks a rule: nothing leaves the device.
        """
        if not self._answering.acquire(blocking=False):
            raise ProtocolError("a request came while another one is answered: one at a time")
        try:
            if self._session is None or wire.is_invitation(request):
                self._agreed = self._memory.agreed()
                self._begin()
            return self._step(request)
        finally:
            self._answering.release()

    def _begin(self) -> None:
        self.close()
        self._session = DeviceSession(self._identity, self._agreed, self, self._random)

    def _step(self, request: bytes) -> bytes:
        session = self._session
        assert session is not None
        try:
            return session.step(request)
        finally:
            self._learn(session.agreed)

    def close(self) -> None:
        """Give up the round that goes on, if one does, and erase its secrets."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def _learn(self, agreed: Agreed) -> None:
        """Keep the newest revocations that a session has seen; where that fails, it is over."""
        newest = agreed.trust.revocations
        if newest is not None and newest != self._agreed.trust.revocations:
            try:
                self._memory.update(newest)
            except BaseException:
                self.close()
                raise
        self._agreed = agreed

    def admit(self, context: Context) -> None:
        """What a session asks before this device sends its keys."""
        if self._ledger is not None:
            self._ledger.admit(self._agreed.manifest, context)

    def contribute(self, context: Context, model: bytes) -> Residues:
        """What a session asks for once the roster is fixed: the debit first, then the training."""
        manifest = self._agreed.manifest
        adapter = vectors.from_bytes(model, manifest.template)
        self._memory.agreed()  # its owner may have left the run since the round began
        if self._ledger is not None:
            self._ledger.debit(manifest, context)
        task = TrainTask(manifest.hash, context.round_num, context.attempt, adapter)
        return self._contribute(task).vector
