"""Who is there: the enrolled devices that are connected, and those of them that are ready for the run.

A device is ready when it has answered the run's offer so: its owner agreed, its model is loaded, its conditions hold.
One that is not is asked again after a while, and whenever it comes back.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass

from fedmini import offer as offers
from fedmini.deployment.preference import Preference
from fedmini.errors import ConfigError, FedMiniError, UpdateError
from fedmini.events import Emit
from fedmini.flower import registry, replies
from fedmini.flower.codec import Envelope
from fedmini.flower.incoming import Reply
from fedmini.flower.server_link import ServerLink
from fedmini.offer import Offer
from fedmini.secagg.signed_manifest import SignedManifest
from fedmini.secagg.trust import Trust
from fedmini.server_folder import Roll, ServerFolder
from fedmini.types import DeviceId

OFFER_SECONDS = 120.0  # a device may have to load its model first
ASK_AGAIN_SECONDS = 15.0


@dataclass(slots=True)
class _Known:
    """What the server knows of one enrolled device now."""

    node: int
    is_online: bool = False
    is_ready: bool = False
    asked: str | None = None  # the id of the offer that it has not answered yet
    asked_at: float = 0.0
    why: str = "it was not asked yet"


class RollCall:
    """Keeps the SuperLink's list of nodes as the server's folder has it, and knows who is ready.

    `local_port`: of the SuperLink's control API; None: who runs the SuperLink registers the devices there.
    """

    def __init__(
        self, folder: ServerFolder, local_port: int | None, link: ServerLink, signed: SignedManifest, emit: Emit
    ) -> None:
        self.preference = Preference()
        self._num_wanted = signed.manifest.release.max_devices
        self._folder, self._local_port, self._link, self._emit = folder, local_port, link, emit
        self._signed = signed
        self._fingerprint = ""
        self._roll: Roll = folder.roll()
        self._known: dict[DeviceId, _Known] = {}
        self._refused: dict[DeviceId, str] = {}  # whom the SuperLink does not let in, and why
        self._next_look = 0.0

    @property
    def trust(self) -> Trust:
        """Whom the server believes now, with the newest revocations."""
        return self._roll.trust

    def ready(self) -> tuple[DeviceId, ...]:
        """The devices that have said so, sorted."""
        return tuple(sorted(name for name, known in self._known.items() if known.is_ready))

    def willing(self) -> tuple[DeviceId, ...]:
        """Those of them whom a round should ask."""
        return self.preference.choose(self.ready(), self._num_wanted)

    def waiting_for(self) -> dict[DeviceId, str]:
        """Who is enrolled and not ready, and why."""
        missing = {
            name: known.why if known.is_online else "it is not connected"
            for name, known in self._known.items()
            if not known.is_ready
        }
        return dict(sorted((missing | self._refused).items()))

    def node(self, device: DeviceId) -> int | None:
        """The node of a device that may log in."""
        known = self._known.get(device)
        return known.node if known is not None else None

    def device_key(self, device: DeviceId) -> bytes | None:
        """The key that a device signs with; None where it may not log in any more."""
        found = self._roll.devices.get(device)
        return found.certificate.device_key if found is not None else None

    def not_ready(self, device: DeviceId, why: str) -> None:
        """A device did not answer, or not so that it can be used: it is asked anew before a round counts on it."""
        known = self._known.get(device)
        if known is not None and known.is_ready:
            known.is_ready, known.why, known.asked_at = False, why, time.monotonic()
            self._emit("device.not_ready", device=device, why=why)

    def begin_anew(self) -> None:
        """The link has begun another run: nobody has answered in it."""
        for known in self._known.values():
            known.is_ready, known.asked, known.asked_at = False, None, 0.0

    def look(self, wait_s: float) -> None:
        """Find out who is there, ask who was not asked, and hear answers for so long. Raises LinkError."""
        self.follow_folder()
        online = self._link.nodes()
        for name, known in self._known.items():
            was, known.is_online = known.is_online, known.node in online
            if was and not known.is_online:
                known.is_ready, known.asked, known.asked_at = False, None, 0.0
                self._emit("device.gone", device=name)
        self._ask()
        self._hear(time.monotonic() + wait_s)

    def follow_folder(self) -> None:
        """Let in who was enrolled since, and keep out who was revoked or removed."""
        now = self._folder.fingerprint()
        has_changed, believed = now != self._fingerprint, _signed_by_operator(self._roll)
        if not has_changed and self._local_port is not None:
            return
        try:
            self._roll = self._folder.roll() if has_changed else self._roll
        except FedMiniError as error:  # in the middle of a change: the next look sees it whole
            self._emit("folder.unreadable", reason=str(error))
            return
        wanted = {device.login_key_bytes: name for name, device in self._roll.devices.items()}
        nodes = self._found(wanted) if self._local_port is None else self._registered(wanted, self._local_port)
        self._known = {
            name: self._known[name] if name in self._known and self._known[name].node == node else _Known(node)
            for name, node in nodes.items()
        }
        must_follow = _signed_by_operator(self._roll) != believed
        for known in self._known.values():
            if must_follow:  # a device takes part again once it has what the operator has signed since
                known.is_ready, known.asked = False, None
            if has_changed and not known.is_ready:  # what is offered may have changed
                known.asked_at = 0.0
        self._fingerprint = now

    def _registered(self, wanted: Mapping[bytes, DeviceId], local_port: int) -> dict[DeviceId, int]:
        """The nodes of these keys, which the SuperLink lets in, and no others: it never lets in one again that it cut off."""
        token = self._folder.token
        for node in registry.list_nodes(local_port, token):
            if node.public_key not in wanted:
                registry.unregister_node(local_port, token, node.node_id)
                self._folder.note_spent(node.public_key)
                self._emit("device.cut_off", node=str(node.node_id))
        nodes: dict[DeviceId, int] = {}
        self._refused = {}
        for key, name in wanted.items():
            try:
                nodes[name] = registry.register_node(local_port, token, key)
            except ConfigError as error:  # costs nobody else
                self._refused[name] = str(error)
                self._folder.note_spent(key)
                self._emit("device.refused", device=name, reason=str(error))
        return nodes

    def _found(self, wanted: Mapping[bytes, DeviceId]) -> dict[DeviceId, int]:
        """The nodes of these keys that are connected or were; 0, which is no node's, where one never was."""
        found = self._link.nodes_by_key()
        before = {name: known.node for name, known in self._known.items()}
        return {name: found.get(key, before.get(name, 0)) for key, name in wanted.items()}

    def _ask(self) -> None:
        now = time.monotonic()
        due = []
        for name, known in self._known.items():
            if known.asked is not None and now - known.asked_at > OFFER_SECONDS:
                known.asked, known.why = None, "it does not answer"
            rested = known.asked_at == 0.0 or now - known.asked_at > ASK_AGAIN_SECONDS
            if known.is_online and not known.is_ready and known.asked is None and rested:
                due.append((name, known))
        requests = ((known.node, self._offer(name)) for name, known in due)
        for (_, known), asked in zip(due, self._link.send_all(requests, OFFER_SECONDS), strict=False):
            known.asked, known.asked_at = asked, now

    def _offer(self, name: DeviceId) -> Envelope:
        roll = self._roll
        certificate = roll.devices[name].certificate
        offer = Offer(self._signed, roll.rotations, roll.trust.revocations, certificate)
        return Envelope("offer", {}, offers.write(offer))

    def _hear(self, until: float) -> None:
        pending = {known.asked: name for name, known in self._known.items() if known.asked is not None}
        if not pending:
            time.sleep(max(0.0, until - time.monotonic()))
            return
        for reply in self._link.receive(pending, until):
            self._take(pending[reply.message_id], reply)

    def _take(self, name: DeviceId, reply: Reply) -> None:
        known = self._known[name]
        known.asked = None
        known.asked_at = time.monotonic()
        if reply.envelope is None:
            known.why = f"no answer came ({reply.problem})"
            return
        device_key = self.device_key(name)
        if device_key is None:
            return
        try:
            replies.check(device_key, reply.message_id, reply.envelope)
        except UpdateError as error:
            known.why = str(error)
            self._emit("reply.refused", device=name, why=str(error))
            return
        known.is_ready = reply.envelope.kind == "ready"
        if known.is_ready:
            self._emit("device.ready", device=name)
            return
        known.why = refusal_of(reply.envelope)
        self._emit("device.declines", device=name, why=known.why)


def _signed_by_operator(roll: Roll) -> tuple[object, ...]:
    """What a device has to have followed before its answers count."""
    return roll.trust.operator_key, roll.trust.revocations_sequence


def refusal_of(envelope: Envelope) -> str:
    """Why a device declined, as it may be logged: short, printable, and its own words only."""
    code, reason = envelope.fields.get("code"), envelope.fields.get("reason")
    text = f"{code}: {reason}" if isinstance(code, str) and isinstance(reason, str) and reason != code else str(code)
    return "".join(letter if letter.isprintable() else "?" for letter in text)[:300]
