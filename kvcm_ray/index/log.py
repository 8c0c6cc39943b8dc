"""The log of an index: one entry a commit, bounded in bytes, oldest dropped first.

To follow an index, start from a snapshot (`IndexWriter.snapshot`) and apply the entries after its
`commit_seq` in order. Who falls behind the oldest entry kept gets `LogGap`: take a new snapshot.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kvcm_ray.errors import Conflict, Corrupt
from kvcm_ray.index import codec
from kvcm_ray.index.tables import COUNTERS, Tables, get_meta

ENTRIES_PER_READ = 256


class LogGap(Conflict):
    """The log does not reach back that far."""

    code = "KVCM-I003"
    hint = "Take a snapshot of the index and follow the log from there."


@dataclass(frozen=True, slots=True)
class LogEntry:
    """What one commit changed."""

    seq: int
    payload: bytes  #: msgpack ``[epoch, operations]``

    def decode(self) -> tuple[int, list[list[Any]]]:
        epoch, ops = codec.unpack(self.payload)
        return epoch, ops


def read_log(txn: Any, tables: Tables, from_seq: int) -> list[LogEntry]:
    """Up to `ENTRIES_PER_READ` entries with numbers of `from_seq` and up.

    Raises:
        LogGap: an entry in that range was dropped already (or `from_seq` is in the future).
        Corrupt: an entry or the counters are damaged.
    """
    payload = get_meta(txn, tables, COUNTERS)
    if payload is None:
        raise Corrupt("the counters of the index are damaged")
    counters = codec.Counters.decode(payload)
    if not counters.log_first <= from_seq <= counters.seq + 1:
        raise LogGap(f"log entry {from_seq} is not kept; the log holds {counters.log_first}..{counters.seq}")
    last = min(counters.seq, from_seq + ENTRIES_PER_READ - 1)
    return [_entry(txn, tables, seq) for seq in range(from_seq, last + 1)]


def _entry(txn: Any, tables: Tables, seq: int) -> LogEntry:
    key = codec.U64.pack(seq)
    payload = codec.unseal(b"log", key, txn.get(key, None, tables.log))
    if payload is None:
        raise Corrupt(f"log entry {seq} is damaged or missing")
    return LogEntry(seq, payload)


def follow(read: Any, from_seq: int) -> Iterator[LogEntry]:
    """All entries up to the present one; `read(seq)` returns the next few, none at the end."""
    while entries := read(from_seq):
        yield from entries
        from_seq = entries[-1].seq + 1
