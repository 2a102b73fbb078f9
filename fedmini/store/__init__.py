"""A device's examples: encrypted on its disk, capped by count, age and size, frozen for a run, erased for good.

FOLDER/examples.db    SQLite (0600, with -wal and -shm beside it while it is open): each example by itself in AES-256-GCM
FOLDER/store.key      the key (0600), where there was no OS keyring when the store was made
FOLDER/room-to-erase  random bytes, given up when a person erases on a full disk

Encrypted: every prompt and response. In clear, but authenticated: when an example came, rounded down to whole minutes. In
clear: how many there are, how long each is, and the runs whose frozen sets they are in. Who can write the folder can delete
examples, take them out of a frozen set, or put an older copy of the whole folder there; without the key, nobody can read an
example, alter it, date it differently or pass it off as another.
"""

from fedmini.store.example_store import ExampleStore
from fedmini.store.os_keyring import Keyring
from fedmini.store.stored_example import StoredExample

__all__ = ["ExampleStore", "Keyring", "StoredExample"]
