"""Flower's SuperLink as an app in this process: node authentication on, runs nothing, logs nothing that a message holds.

The only module that touches SuperLink's internals.
"""

import logging
from pathlib import Path

from flwr.supercore.constant import NodeStatus
from flwr.supercore.logger import FLOWER_LOGGER
from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.main import create_app
from starlette.applications import Starlette

from fedmini import events
from fedmini.errors import StateError


def create(database: Path) -> Starlette:
    """The whole API over one SQLite file. Its lifespan has to be run. Raises StateError where it can't be used."""
    config = SuperLinkLifespanConfig(
        control_address="",
        health_server_address=None,
        host="127.0.0.1",
        port=0,
        insecure=True,  # TLS ends before this app
        certificates=None,
        superexec_auth_secret=None,
        authn_plugin=NoOpControlAuthnPlugin(),
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=True,
        fleet_api_type="grpc-rere",
        fleet_api_address=None,
        simulation=False,
        ssl_ca_certfile=None,
        ssl_certfile=None,
        ssl_keyfile=None,
        database=str(database),
        isolation="process",  # no child that would run an app's code
        runtime_dependency_install=False,
    )
    try:
        return create_app(config, SuperLinkLifespan)
    except Exception as error:  # SQLAlchemy's, alembic's and sqlite's, and more
        raise StateError(
            f"can't use the database {database} ({type(error).__name__}): is it a SuperLink's, of this version of Flower? "
            "Restore it, or move it away: devices then have to be registered again"
        ) from error


def capture_logs(emit: events.Emit) -> None:
    """Send what Flower, uvicorn and the rest log to `emit`: where it came from, never its text.

    Flower's messages quote requests (keys, headers, exceptions about content), so only their place is passed on.
    """
    handler = _PlaceOnly(emit)
    FLOWER_LOGGER.handlers = []
    FLOWER_LOGGER.propagate = True
    FLOWER_LOGGER.setLevel(logging.WARNING)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi"):
        logging.getLogger(name).setLevel(logging.ERROR)  # it warns of every bad request: anybody could fill the disk
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)


class _PlaceOnly(logging.Handler):
    def __init__(self, emit: events.Emit) -> None:
        super().__init__(logging.WARNING)
        self._emit = emit

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[0] if record.exc_info else None
        self._emit(
            "superlink.log",
            level=record.levelname.lower(),
            place=f"{record.name}:{record.module}:{record.lineno}",
            error=error.__name__ if error else None,
        )


def registered_keys(app: Starlette) -> dict[bytes, int]:
    """The public keys (PEM) of the devices that may connect, and their node ids."""
    nodes = app.state.linkstate_factory.state().get_node_info(
        statuses=[NodeStatus.REGISTERED, NodeStatus.ONLINE, NodeStatus.OFFLINE]
    )
    return {node.public_key: node.node_id for node in nodes}
