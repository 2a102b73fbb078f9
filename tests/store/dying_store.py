"""Kill a process at every step of making or erasing a store, and print what the next one finds: `dying_store.py WHAT PLACE DIR`.

Before and after each call that changes a file, a database or a keyring is a step. One line for each step, in order:
whether the process was killed there, how many of two examples are there afterwards, and how many keys.
"""

import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from stores import FindKeyring, FolderKeyring, no_keyring, open_store

STEPS = {
    "execute",
    "executescript",
    "close",
    "open",
    "write",
    "pwrite",
    "fsync",
    "chmod",
    "rename",
    "replace",
    "unlink",
}


def kill_at(step: int) -> None:
    """From here on, count steps, and die at this one."""
    count = 0

    def see(_: object, event: str, function: object) -> None:
        nonlocal count
        if event in ("c_call", "c_return") and getattr(function, "__name__", "") in STEPS:
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)

    threading.setprofile(see)  # a keyring is asked in a thread of its own
    sys.setprofile(see)


def killed_in(work: Callable[[], None], step: int) -> bool:
    child = os.fork()
    if child == 0:
        kill_at(step)
        work()
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def main(what: str, place: str, parent: Path) -> None:
    step, killed = 0, True
    with open_store(parent / "whole" / "store", find_keyring=keyring_of(place, parent / "whole")) as store:
        store.add("first")
        store.add("second")
        store.freeze("run", 2)
    while killed:
        step += 1
        here = parent / str(step)
        if what == "erase":
            shutil.copytree(parent / "whole", here)
        else:
            here.mkdir()
        find_keyring = keyring_of(place, here)
        killed = killed_in(lambda: run(what, here / "store", find_keyring), step)  # noqa: B023
        num_examples = check(here / "store", find_keyring)
        num_keys = len([*here.glob("keys/*"), *here.glob("store/*.key")])
        print(int(killed), num_examples, num_keys, flush=True)
        shutil.rmtree(here)


def keyring_of(place: str, parent: Path) -> FindKeyring:
    return (lambda: FolderKeyring(parent / "keys")) if place == "keyring" else no_keyring


def run(what: str, folder: Path, find_keyring: FindKeyring) -> None:
    with open_store(folder, find_keyring=find_keyring) as store:
        if what == "erase":
            store.erase()


def check(folder: Path, find_keyring: FindKeyring) -> int:
    """How many examples are there; the store is whole and goes on."""
    with open_store(folder, find_keyring=find_keyring) as store:
        num_examples = store.num_examples
        assert len(store.freeze("run", 2)) == num_examples, "half an erasure"
        store.add("after")
        assert [one.response for one in store.examples()][num_examples:] == ["after"]
    return num_examples


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
