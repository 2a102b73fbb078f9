"""A task that a process of Flower's has acquired and keeps alive: what else speaks for it needs its address and its token.

The only module that looks inside Flower's HttpGrid.
"""

import ssl
from dataclasses import dataclass

from flwr.serverapp import Grid

from fedmini.errors import StateError
from fedmini.flower import fleet


@dataclass(frozen=True, slots=True, repr=False)
class AcquiredTask:
    """Where a task is known, and by what token. Its repr shows no token."""

    url: str
    tls: ssl.SSLContext | None
    token: str
    run: int


def of_grid(grid: Grid) -> AcquiredTask:
    """The task of the ServerApp that this grid was given to. Raises StateError where it leads to no SuperLink."""
    try:
        address, token = grid._addr, grid._token  # type: ignore[attr-defined]
        is_insecure, roots = grid._insecure, grid._cert  # type: ignore[attr-defined]
    except AttributeError:
        raise StateError(
            f"expected Flower's grid to a SuperLink, got {type(grid).__name__}: a simulation takes config and output"
        ) from None
    tls = None if is_insecure else fleet.tls_context(roots)
    return AcquiredTask(f"{'http' if is_insecure else 'https'}://{address}", tls, token, grid.run.run_id)
