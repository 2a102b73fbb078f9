"""The rows of the examples and of the frozen sets, inside a transaction that the caller holds.

An example is kept until it is evicted (over a cap) or expired. Evicted, its row stays while a frozen set holds it, unseen
by everything else.
"""

import sqlite3
from collections.abc import Iterator
from typing import TypeAlias

SealedRow: TypeAlias = tuple[int, int, bytes]  # row, added_minute, sealed


def reserve(connection: sqlite3.Connection, num_rows: int) -> int:
    """The first of so many row numbers that nobody had or will have."""
    (first,) = connection.execute("SELECT next_row FROM store").fetchone()
    connection.execute("UPDATE store SET next_row = ?", (first + num_rows,))
    return int(first)


def insert(connection: sqlite3.Connection, sealed: Iterator[SealedRow]) -> None:
    """Put examples behind those that are there."""
    connection.executemany(
        "INSERT INTO examples (row, added_minute, size_bytes, sealed) VALUES (?, ?, ?, ?)",
        ((row, added_minute, len(content), content) for row, added_minute, content in sealed),
    )


def kept(connection: sqlite3.Connection) -> list[SealedRow]:
    """Every kept example, oldest first."""
    return connection.execute(
        "SELECT row, added_minute, sealed FROM examples WHERE evicted = 0 ORDER BY row"
    ).fetchall()


def totals(connection: sqlite3.Connection) -> tuple[int, int]:
    """How many examples are kept, and their bytes as encrypted."""
    num_kept, size_bytes = connection.execute(
        "SELECT COUNT(*), COALESCE(SUM(size_bytes), 0) FROM examples WHERE evicted = 0"
    ).fetchone()
    return int(num_kept), int(size_bytes)


def expire(connection: sqlite3.Connection, last_minute: int) -> None:
    """Delete what came in this minute or before, out of the frozen sets too."""
    if connection.execute("DELETE FROM examples WHERE added_minute <= ?", (last_minute,)).rowcount:
        connection.execute("DELETE FROM frozen_rows WHERE row NOT IN (SELECT row FROM examples)")


def evict(connection: sqlite3.Connection, max_examples: int, max_bytes: int) -> None:
    """Drop the oldest until what is kept is within both caps."""
    num_kept, size_bytes = totals(connection)
    if num_kept <= max_examples and size_bytes <= max_bytes:
        return
    last = 0
    for row, row_bytes in connection.execute("SELECT row, size_bytes FROM examples WHERE evicted = 0 ORDER BY row"):
        if num_kept <= max_examples and size_bytes <= max_bytes:
            break
        last, num_kept, size_bytes = row, num_kept - 1, size_bytes - row_bytes
    connection.execute("UPDATE examples SET evicted = 1 WHERE evicted = 0 AND row <= ?", (last,))
    _delete_unheld(connection)


def freeze(connection: sqlite3.Connection, run_id: str, max_examples: int) -> None:
    """Remember the newest examples as a run's set, unless it has one already (an empty one is one)."""
    if connection.execute("INSERT OR IGNORE INTO frozen_runs VALUES (?)", (run_id,)).rowcount:
        connection.execute(
            "INSERT INTO frozen_rows SELECT ?, row FROM examples WHERE evicted = 0 ORDER BY row DESC LIMIT ?",
            (run_id, max_examples),
        )


def frozen(connection: sqlite3.Connection, run_id: str) -> list[SealedRow]:
    """What is left of a run's set, oldest first."""
    return connection.execute(
        "SELECT row, added_minute, sealed FROM frozen_rows JOIN examples USING (row) WHERE run_id = ? ORDER BY row",
        (run_id,),
    ).fetchall()


def thaw(connection: sqlite3.Connection, run_id: str) -> None:
    """Forget a run's set, and delete what was there for it only."""
    connection.execute("DELETE FROM frozen_runs WHERE run_id = ?", (run_id,))
    connection.execute("DELETE FROM frozen_rows WHERE run_id = ?", (run_id,))
    _delete_unheld(connection)


def delete_all(connection: sqlite3.Connection) -> None:
    """Delete every example and every frozen set, and note that the key must go too."""
    for table in ("examples", "frozen_rows", "frozen_runs"):
        connection.execute(f"DELETE FROM {table}")
    connection.execute("UPDATE store SET erasing = 1")


def _delete_unheld(connection: sqlite3.Connection) -> None:
    connection.execute("DELETE FROM examples WHERE evicted = 1 AND row NOT IN (SELECT row FROM frozen_rows)")
