"""The token of the loopback listener: to be on this machine is no authentication, any local user is."""

import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from fedmini.flower import answers

HEADER = "fedmini-token"


def headers(token: str) -> dict[str, str]:
    """What a call to the loopback listener has to carry."""
    return {HEADER: token}


class TokenRequired:
    """Answers 401 to whoever does not show the token, before anything else is looked at."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self.app = app
        self._token = token.encode("ascii")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._is_shown(scope):
            return await self.app(scope, receive, send)
        await answers.bare(401).send(send)

    def _is_shown(self, scope: Scope) -> bool:
        shown = [value for name, value in scope["headers"] if name == HEADER.encode("ascii")]
        return len(shown) == 1 and hmac.compare_digest(shown[0], self._token)
