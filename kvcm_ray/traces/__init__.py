"""Request traces: which prompt blocks came in which order, to replay and to compute with.

    files     files of JSON lines, plain or gzip; the traces that come with the package
    formats   what a line means: Mooncake, Qwen-Bailian, Tair events, our own
    keys      from the ids in them to 64-bit prefix keys
    reader    `open_trace` streams a file as `TraceRequest`s
    replay    a trace against a live manager
    pattern   gives every key its own bytes, so that a replay can verify each byte it reads

Nothing here needs numba; `kvcm_ray.optimizer` makes arrays of whole traces.
"""

from kvcm_ray.traces.files import BUNDLED, bundled, resolve
from kvcm_ray.traces.formats import READ, REQUEST, WRITE
from kvcm_ray.traces.pattern import block_pattern, wrong_bytes
from kvcm_ray.traces.reader import TraceRequest, open_trace

__all__ = [
    "BUNDLED", "READ", "REQUEST", "WRITE", "TraceRequest", "block_pattern", "bundled", "open_trace",
    "resolve", "wrong_bytes",
]  # fmt: skip
