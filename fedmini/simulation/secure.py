"""Secure aggregation inside a simulation: the whole protocol runs, with the server and every device in this process.

The operator is made up for the run, and each device is enrolled, agrees to the signed manifest and keeps its own ledger
as a real one would. Keys and shares come from the operating system in a seeded run too: they cancel.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path

from fedmini.errors import PrivacyBudgetError, ProtocolError
from fedmini.member import ForThisProcess, Member, OwnLedger
from fedmini.privacy import consistency
from fedmini.privacy.device_ledger import LifetimeLimits
from fedmini.secagg import signed_manifest, signing_keys, trust
from fedmini.secagg.checks import Agreed
from fedmini.secagg.messages import Stage
from fedmini.secagg.trust import Identity, Trust
from fedmini.simulation.setup import Setup
from fedmini.types import DeviceId, RoundReport

# A simulated device refuses nothing that its researcher wants to know the price of.
NO_LIMIT = LifetimeLimits(lifetime_epsilon=math.inf, lifetime_delta=1e-5)


class SecureDevices:
    """The devices of a simulation as members of secure rounds, and the transport between them and the server.

    `folder` holds each device's own ledger. `tell` hears why a device gave up a round.
    """

    def __init__(self, setup: Setup, folder: Path, tell: Callable[[str], None]) -> None:
        self._setup, self._folder, self._tell = setup, folder, tell
        self._operator = signing_keys.draw()
        self.trust = Trust(signing_keys.public_bytes(self._operator))
        manifest = setup.run.manifest
        signed_manifest.check_manifest(self.trust, signed_manifest.sign_manifest(self._operator, manifest, None))
        consistency.check_consistency(manifest)
        self._identities: dict[DeviceId, Identity] = {}
        self._sent: Counter[DeviceId] = Counter()
        self._received: Counter[DeviceId] = Counter()
        folder.mkdir(parents=True, exist_ok=True)

    def exchange(
        self, lost: Collection[DeviceId], on_answer: Callable[[], None]
    ) -> Callable[[Stage, Iterator[tuple[DeviceId, bytes]]], Iterator[tuple[DeviceId, bytes]]]:
        """The transport of one round. The `lost` devices send keys and shares, and then no vector."""
        members: dict[DeviceId, Member] = {}
        self._sent, self._received = Counter(), Counter()

        def exchange(stage: Stage, requests: Iterator[tuple[DeviceId, bytes]]) -> Iterator[tuple[DeviceId, bytes]]:
            for device, request in requests:
                if stage is Stage.ADVERTISE:
                    members[device] = self._member(device)
                if stage is Stage.CONTRIBUTE and device in lost:
                    continue
                try:
                    answer = members[device].answer(request)
                except (ProtocolError, PrivacyBudgetError) as error:
                    self._tell(f"{device} gave up the round: {error}")
                    continue
                self._sent[device] += len(answer)
                self._received[device] += len(request)
                yield device, answer
                if stage is Stage.CONTRIBUTE:
                    on_answer()

        return exchange

    def with_traffic(self, report: RoundReport) -> RoundReport:
        """The report of the last round with the bytes that really passed: the most that a device sent, and received."""
        return replace(
            report,
            upload_bytes_per_device=max(self._sent.values()),
            download_bytes_per_device=max(self._received.values()),
        )

    def _member(self, device: DeviceId) -> Member:
        run = self._setup.run
        ledger = None
        if run.manifest.release.units:
            name = hashlib.sha256(device.encode()).hexdigest()[:16]
            ledger = OwnLedger(self._folder / f"{name}.jsonl", NO_LIMIT, run.is_seeded)
        agreed = Agreed(device, run.manifest, self.trust)
        return Member(self._identity(device), ForThisProcess(agreed), self._setup.devices[device].contribute, ledger)

    def _identity(self, device: DeviceId) -> Identity:
        if device not in self._identities:
            key = signing_keys.draw()
            certificate = trust.certify(self._operator, device, signing_keys.public_bytes(key))
            self._identities[device] = Identity(key, certificate)
        return self._identities[device]
