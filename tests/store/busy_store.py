"""Add to a store and say so, line by line: `busy_store.py FOLDER NAME NUM_EXAMPLES NUM_THREADS ERASE_EVERY`.

`ready` when it is open; then it waits for a line. `? 3` before example 3 is added, `+ 3` once it is acknowledged; `! 3` and
`- 3` around an erasure.
"""

import sys
import threading
from pathlib import Path

from stores import open_store

from fedmini.store import ExampleStore


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def work(store: ExampleStore, name: str, num_examples: int, erase_every: int) -> None:
    for number in range(num_examples):
        say(f"? {name} {number}")
        store.add(f"{name} {number}", prompt="x" * (number * 997 % 5000) + "?")
        say(f"+ {name} {number}")
        if erase_every and number % erase_every == erase_every - 1:
            say(f"! {name} {number}")
            store.erase()
            say(f"- {name} {number}")


def main(folder: Path, name: str, num_examples: int, num_threads: int, erase_every: int) -> None:
    with open_store(folder) as store:
        say("ready")
        sys.stdin.readline()
        threads = [
            threading.Thread(target=work, args=(store, f"{name}.{index}", num_examples, erase_every))
            for index in range(num_threads)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], *(int(argument) for argument in sys.argv[3:]))
