"""Whom a round asks first, of those that are ready: so that no device, broken or hostile, costs every attempt at a round.

What the server sees proves little: a device that says another sealed it bad shares may itself be the one that lies. So it
condemns nobody. It keeps the two apart, and it asks those last that left a round after it was paid for.
"""

from collections import Counter
from collections.abc import Iterable

from fedmini.types import DeviceId


class Preference:
    """What happened in this process's rounds, as far as it decides whom to ask; a new process begins without it."""

    def __init__(self) -> None:
        self._apart: set[frozenset[DeviceId]] = set()
        self._left: Counter[DeviceId] = Counter()

    def blamed(self, holder: DeviceId, dealer: DeviceId) -> None:
        """`holder` says that `dealer` sealed it bad shares: one of the two lies, and they never meet again."""
        if holder != dealer:
            self._apart.add(frozenset((holder, dealer)))

    def left(self, device: DeviceId) -> None:
        """A device gave up a round after its roster was fixed, once more."""
        self._left[device] += 1

    def stayed(self, device: DeviceId) -> None:
        """A device saw a round through: what it left before is forgotten."""
        del self._left[device]

    def choose(self, ready: Iterable[DeviceId], num_wanted: int) -> tuple[DeviceId, ...]:
        """Those whom a round may ask, sorted: no two that are kept apart, and those that left only where they are needed.

        Guarantee: h hostile devices, whatever they say and of whom, cost at most h honest ones their place. No pair that is
        apart is of two honest devices; of pairs that have nobody in common, all are left out, at most one for each hostile
        device; and who then meets nobody that it is apart from comes back, those first who are in the fewest pairs.
        """
        chosen = set(ready)
        pairs = sorted(sorted(pair) for pair in self._apart if pair <= chosen)
        degree = Counter(device for pair in pairs for device in pair)
        for one, other in sorted(pairs, key=lambda pair: -degree[pair[0]] - degree[pair[1]]):
            if {one, other} <= chosen:
                chosen -= {one, other}
        for device in sorted(degree, key=lambda device: (degree[device], self._left[device], device)):
            if not any(frozenset((device, other)) in self._apart for other in chosen):
                chosen.add(device)
        for device in sorted(chosen, key=lambda device: (-self._left[device], device)):
            if len(chosen) <= num_wanted or not self._left[device]:
                break
            chosen.discard(device)
        return tuple(sorted(chosen))
