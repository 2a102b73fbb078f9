"""Who waits for what, and which uploads have to end before they are woken. All of it lives in one event loop."""

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

SERVER = 1  # the ServerApp's bell, by SuperLink's own node id; a device's bell is its node id
SESSION_S = 180.0  # how long SuperLink keeps a push open

Bell: TypeAlias = int


@dataclass(eq=False, slots=True)
class Wait:
    """One held poll."""

    rung: asyncio.Event = field(default_factory=asyncio.Event)
    over: bool = False  # a newer poll took its place, or the gate closes


class Bells:
    """The held polls, by what they wait for."""

    def __init__(self) -> None:
        self._waits: dict[Bell, set[Wait]] = {}
        self._quiet: set[Bell] = set()
        self._closed = False

    def listen(self, bell: Bell) -> Wait:
        """A wait that hears this bell until `leave`."""
        wait = Wait(over=self._closed)
        self._waits.setdefault(bell, set()).add(wait)
        return wait

    def leave(self, bell: Bell, wait: Wait) -> None:
        """Stop listening."""
        self._waits[bell].discard(wait)
        if not self._waits[bell]:
            del self._waits[bell]

    def supersede(self, bell: Bell, newest: Wait) -> None:
        """End older waits for the same thing: who polls again has given up its last poll, seen or unseen."""
        for wait in self._waits[bell] - {newest}:
            wait.over = True
            wait.rung.set()

    def note_empty(self, bell: Bell, wait: Wait) -> None:
        """Remember that there was nothing, unless the bell rang meanwhile."""
        if not wait.rung.is_set():
            self._quiet.add(bell)

    def is_quiet(self, bell: Bell) -> bool:
        """Whether there was nothing the last time, and the bell has not rung since."""
        return bell in self._quiet

    def ring(self, bells: Iterable[Bell]) -> None:
        """Wake whoever waits for one of these."""
        for bell in bells:
            self._quiet.discard(bell)
            for wait in self._waits.get(bell, ()):
                wait.rung.set()

    def close(self) -> None:
        """End every wait, now and from now on."""
        self._closed = True
        for waits in self._waits.values():
            for wait in waits:
                wait.over = True
                wait.rung.set()


class Uploads:
    """Which bells wait for which objects of the pushes that are under way."""

    def __init__(self) -> None:
        self._missing: dict[str, dict[Bell, set[str]]] = {}  # by push session

    def begin(self, session_id: str, missing: Mapping[Bell, set[str]]) -> list[Bell]:
        """Note a push; gives the bells for which everything is there already."""
        waiting = {bell: objects for bell, objects in missing.items() if objects}
        if waiting:
            self._missing[session_id] = waiting
            asyncio.get_running_loop().call_later(SESSION_S, self._missing.pop, session_id, None)
        return [bell for bell in missing if bell not in waiting]

    def arrived(self, session_id: str, object_id: str) -> list[Bell]:
        """Note an object; gives the bells for which it was the last one."""
        waiting = self._missing.get(session_id, {})
        complete = []
        for bell, objects in list(waiting.items()):
            objects.discard(object_id)
            if not objects:
                del waiting[bell]
                complete.append(bell)
        return complete
