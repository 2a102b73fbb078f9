"""What the network may ask for: nine calls of the Fleet API, spelt exactly so, and nothing else reaches Flower's code.

Left out on purpose: register-node and unregister-node (an operator does that, on loopback) and get-fab (a device never
runs code that a server sent).
"""

from starlette.types import ASGIApp, Receive, Scope, Send

from fedmini.flower import answers

FLEET_CALLS = (
    "activate-node",
    "deactivate-node",
    "send-node-heartbeat",
    "pull-messages",
    "push-messages",
    "get-run",
    "push-object",
    "pull-object",
    "confirm-message-received",
)
FLEET_PATHS = frozenset(f"/v1/fleet/{call}" for call in FLEET_CALLS)
PUSH_OBJECT = "/v1/fleet/push-object"
# Of any other call. A reply names its objects in 70 bytes each, and SuperLink serves nobody for a millisecond for each:
# 32 KiB are enough for a payload of 1.8 GiB, and cost half a second.
MAX_CALL_BYTES = 32 * 1024
MAX_HEADER_BYTES = 8 * 1024
MAX_HEADERS = 32


class FleetOnly:
    """Passes on an exact POST to an allowed path with a small enough body; answers the rest itself and closes."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = 404 if scope["type"] != "http" else refusal(scope, self.max_body_bytes)
        if status is None:
            return await self.app(scope, receive, send)
        await answers.bare(status).send(send)


def refusal(scope: Scope, max_body_bytes: int) -> int | None:
    """The status that refuses a request, or None where it is allowed.

    Compares the path as it came over the wire, so nothing that decodes, folds or resolves to an allowed path passes.
    """
    path, headers = scope["path"], scope["headers"]
    exact = path in FLEET_PATHS and scope["raw_path"] == path.encode("ascii") and not scope["query_string"]
    if not exact or scope["method"] != "POST" or scope["http_version"] != "1.1" or scope["root_path"]:
        return 404
    if len(headers) > MAX_HEADERS or sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES:
        return 431
    names = [name for name, _ in headers]
    if b"upgrade" in names or names.count(b"host") != 1:
        return 404
    lengths = [value for name, value in headers if name == b"content-length"]
    if b"transfer-encoding" in names or len(lengths) != 1 or not lengths[0].isdigit() or len(lengths[0]) > 12:
        return 413  # the size has to be known before the first byte is read
    most = max_body_bytes if path == PUSH_OBJECT else min(MAX_CALL_BYTES, max_body_bytes)
    return None if int(lengths[0]) <= most else 413
