"""One round that really happened, so that sessions can be brought to any of its stages again, and again."""

import random
from collections import defaultdict
from collections.abc import Mapping

from fedmini.secagg import trust, wire
from fedmini.secagg.checks import Agreed
from fedmini.secagg.device_session import DeviceSession
from fedmini.secagg.messages import Advert, Stage
from fedmini.secagg.server_session import ServerSession
from fedmini.types import DeviceId
from tests import tiny_trust
from tests.secagg.cohort import Cohort


class RecordedRound:
    """Seven devices of which one drops when its vector is asked for; one more than enough are left.

    The devices' randomness is seeded: a session that is given the same requests gives the same answers. A key that was
    enrolled once is revoked, so that the list of keys brings a list of revocations.
    """

    def __init__(self) -> None:
        self.cohort = Cohort(7)
        self.agreed = {
            device: Agreed(device, self.cohort.manifest, self.cohort.trust) for device in self.cohort.devices
        }
        self.cohort.sessions = {device: self.device(device) for device in self.cohort.devices}
        stolen = tiny_trust.enrol(self.cohort.operator, "stolen").certificate.device_key
        self.cohort.trust = self.cohort.trust.updated(trust.revoke(self.cohort.operator, None, [stolen]))
        self.requests: Mapping[Stage, dict[DeviceId, bytes]] = defaultdict(dict)
        self.answers: Mapping[Stage, dict[DeviceId, bytes]] = defaultdict(dict)
        self.survivors = self.cohort.devices[:-1]
        self.cohort.run(self._note_request, {Stage.CONTRIBUTE: self.cohort.devices[-1:]}, change=self._note_answer)

    def _note_request(self, stage: Stage, device: DeviceId, request: bytes) -> bytes:
        self.requests[stage][device] = request
        return request

    def _note_answer(self, stage: Stage, device: DeviceId, answer: bytes) -> bytes:
        self.answers[stage][device] = answer
        return answer

    def device(self, device: DeviceId) -> DeviceSession:
        owner, draw = self.cohort.owners[device], random.Random(device).randbytes
        return DeviceSession(self.cohort.identities[device], self.agreed[device], owner, draw)

    def device_at(self, stage: Stage, device: DeviceId) -> DeviceSession:
        """A session whose next request is of this stage."""
        session = self.device(device)
        for earlier in range(stage):
            assert session.step(self.requests[Stage(earlier)][device]) == self.answers[Stage(earlier)][device]
        return session

    def server_at(self, stage: Stage) -> ServerSession:
        """A session whose next answers are of this stage."""
        session = self.cohort.server()
        for earlier in range(stage):
            session.step(self.answers[Stage(earlier)].items())
        return session

    def advert(self, device: DeviceId, mask_key: bytes, share_key: bytes) -> Advert:
        """What a corrupt device could say: any keys at all, signed with its enrolled one."""
        identity, digest = self.cohort.identities[device], self.cohort.context.digest
        signature = identity.sign("advert", digest, device, mask_key, share_key)
        return Advert(digest, device, mask_key, share_key, identity.certificate, signature)

    def messages(self) -> tuple[bytes, ...]:
        """All that was sent, each once."""
        found = [
            content
            for exchanged in (self.requests, self.answers)
            for stage in Stage
            for content in exchanged[stage].values()
        ]
        return tuple(dict.fromkeys(found))


def decoded(content: bytes, kind: type) -> object:
    return wire.decode(content, kind, 2**20)
