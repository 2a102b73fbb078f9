"""Devices of a deployment as threads of one process, over the network as real ones; they answer by echo, or by the protocol."""

import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import numpy as np
from deployment_counter import Counted

from fedmini.errors import LinkError
from fedmini.flower import fleet, replies
from fedmini.flower.codec import Envelope
from fedmini.flower.fleet import FleetConnection, Received
from fedmini.member import ForThisProcess, Member
from fedmini.secagg import device_keys, signing_keys, trust
from fedmini.secagg.checks import Agreed
from fedmini.secagg.trust import Identity, Trust
from fedmini.types import Contribution, DeviceId, Manifest, TrainTask

MAX_PAYLOAD_BYTES = 2**24


@dataclass(frozen=True, slots=True)
class Fleet:
    """What the devices of one process are made of. It goes to that process through a pipe."""

    url: str
    authority: bytes  # PEM, that the gate's certificate is checked against
    operator: bytes  # the private key that certifies them
    manifest: Manifest
    names: tuple[DeviceId, ...]


@dataclass
class Device:
    """One device: its keys, its member of the run, and the connection that its thread waits on."""

    name: DeviceId
    identity: Identity
    member: Member
    login: device_keys.LoginKey = field(default_factory=device_keys.draw_login)

    def serve(self, url: str, tls: ssl.SSLContext) -> None:
        """Answer whatever comes, until the gate is gone."""
        connection = FleetConnection(url, tls, self.login, MAX_PAYLOAD_BYTES)
        try:
            connection.open()
            while True:
                received = connection.pull()
                if received is not None:
                    connection.reply(received, self._answer(received))
        except LinkError:
            connection.close()

    def _answer(self, received: Received) -> Envelope:
        asked = received.envelope
        payload = self.member.answer(asked.payload) if asked.kind == "request" else asked.payload
        return replies.sign(self.identity, received.message_id, Envelope("answer", {}, payload))


def make_devices(fleet_of: Fleet) -> list[Device]:
    """Enrolled devices that all contribute one vector: where it comes from costs nothing here."""
    operator = signing_keys.read_private(fleet_of.operator, None)
    believed = Trust(signing_keys.public_bytes(operator))
    vector = np.ones(fleet_of.manifest.num_coordinates, np.uint32)

    def contribute(task: TrainTask) -> Contribution:
        return Contribution(vector)

    made = []
    for name in fleet_of.names:
        key = signing_keys.draw()
        identity = Identity(key, trust.certify(operator, name, signing_keys.public_bytes(key)))
        member = Member(identity, ForThisProcess(Agreed(name, fleet_of.manifest, believed)), contribute, ledger=None)
        made.append(Device(name, identity, member))
    return made


def serve(connection: Connection) -> None:
    """A process of devices: says their public keys, serves when it is told to, and ends when the other end is closed.

    Asked in between, it says how many requests they have made so far.
    """
    fleet_of = connection.recv()
    devices = make_devices(fleet_of)
    connection.send(
        [(one.name, one.identity.certificate.device_key, device_keys.login_bytes(one.login)) for one in devices]
    )
    tls = fleet.tls_context(fleet_of.authority)
    with Counted() as counted:
        answers: dict[str, Callable[[], object]] = {
            "serve": lambda: [_begin(device, fleet_of.url, tls) for device in devices] and None,
            "count": lambda: counted.num_requests,
        }
        while True:
            try:
                asked = connection.recv()
            except EOFError:
                return
            connection.send(answers[asked]())


def _begin(device: Device, url: str, tls: ssl.SSLContext) -> None:
    threading.Thread(target=device.serve, args=(url, tls), daemon=True).start()
