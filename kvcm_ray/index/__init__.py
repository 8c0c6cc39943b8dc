"""The prefix index of an instance: runs of blocks in one LMDB environment.

`IndexWriter` is the only writer (fenced by epoch), `IndexReader` looks up in any process without an
RPC, `IndexReplica` follows by the log. Block states are tables here: sessions hold WRITING blocks,
runs SERVING ones (and `copies` a second place of some of them), trash DELETING ones.
"""

from kvcm_ray.index.batch import IndexBatch
from kvcm_ray.index.codec import Run
from kvcm_ray.index.log import LogEntry, LogGap
from kvcm_ray.index.reader import IndexReader, Match
from kvcm_ray.index.writer import IndexReplica, IndexStats, IndexWriter

__all__ = [
    "IndexBatch",
    "IndexReader",
    "IndexReplica",
    "IndexStats",
    "IndexWriter",
    "LogEntry",
    "LogGap",
    "Match",
    "Run",
]
