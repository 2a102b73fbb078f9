"""Which devices may connect: SuperLink's list of public keys, over the loopback control API."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListNodesResponse,
    RegisterNodeRequest,
    RegisterNodeResponse,
    UnregisterNodeRequest,
    UnregisterNodeResponse,
)
from flwr.supercore.constant import NodeStatus

from fedmini.errors import ConfigError, LinkError
from fedmini.flower import loopback_token
from fedmini.flower.calls import Calls


@dataclass(frozen=True, slots=True)
class Node:
    """A device as SuperLink knows it."""

    node_id: int
    public_key: bytes  # PEM
    status: str  # registered (never seen), online, offline
    last_activated: str  # ISO time; empty if it never was


def register_node(local_port: int, token: str, public_key: bytes) -> int:
    """Let the holder of a public key (PEM, a NIST curve) connect; gives its node id, the same one every time.

    Raises ConfigError where SuperLink refuses the key: a revoked one stays refused. LinkError where nobody answers.
    """
    with _control(local_port, token) as control:
        known = {node.public_key: node.node_id for node in _nodes(control)}
        if public_key in known:
            return known[public_key]
        try:
            request = RegisterNodeRequest(public_key=public_key)
            return control.call("/v1/control/register-node", request, RegisterNodeResponse).node_id
        except LinkError as error:
            if error.status not in (400, 412):
                raise
            raise ConfigError(
                "its login key was refused: expected one on a NIST curve, as PEM, that was never cut off; make another with "
                "`fedmini device new-login` on the device, and enroll its device.pub again"
            ) from error


def unregister_node(local_port: int, token: str, node_id: int) -> bool:
    """Refuse a device from now on, also in the middle of a connection; False where it was not registered."""
    with _control(local_port, token) as control:
        if node_id not in {node.node_id for node in _nodes(control)}:
            return False
        request = UnregisterNodeRequest(node_id=node_id)
        control.call("/v1/control/unregister-node", request, UnregisterNodeResponse)
        return True


def list_nodes(local_port: int, token: str) -> tuple[Node, ...]:
    """The devices that may connect."""
    with _control(local_port, token) as control:
        return _nodes(control)


def _nodes(control: Calls) -> tuple[Node, ...]:
    found = control.call("/v1/control/list-nodes", ListNodesRequest(), ListNodesResponse)
    return tuple(
        Node(info.node_id, info.public_key, info.status, info.last_activated_at)
        for info in found.nodes_info
        if info.status != NodeStatus.UNREGISTERED
    )


@contextmanager
def _control(local_port: int, token: str) -> Iterator[Calls]:
    control = Calls(f"http://127.0.0.1:{local_port}", None, "flwr-cli", lambda: loopback_token.headers(token))
    try:
        yield control
    finally:
        control.close()
