"""Memory that one thread uses again and again: fresh pages for every layer would cost more than the arithmetic."""

import math
import threading

import torch


def scratch(purpose: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Uninitialised memory of that shape, valid until this thread asks for the same purpose, type and device again."""
    view = _HELD.views.get((purpose, shape, dtype, device))
    return _HELD.view(purpose, shape, dtype, device) if view is None else view


class _Held(threading.local):
    """Per purpose, type and device the largest piece asked for so far, and the views of it that were."""

    def __init__(self) -> None:
        self.pieces: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}
        self.views: dict[tuple[str, tuple[int, ...], torch.dtype, torch.device], torch.Tensor] = {}

    def view(self, purpose: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        key, size = (purpose, dtype, device), math.prod(shape)
        if key not in self.pieces or self.pieces[key].numel() < size:
            # What the views of the smaller piece held is let go, or both would stay.
            self.views = {of: view for of, view in self.views.items() if (of[0], of[2], of[3]) != key}
            self.pieces[key] = torch.empty(size, dtype=dtype, device=device)
        view = self.views[(purpose, shape, dtype, device)] = self.pieces[key][:size].view(shape)
        return view


_HELD = _Held()
