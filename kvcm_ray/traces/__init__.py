"""Request traces: which prompt blocks came in which order, to replay against a live manager.

`open_trace` streams a file of one of the known formats, plain or gzip, as `TraceRequest`s whose
keys are 64-bit prefix keys; `bundled` names the traces that come with the package. `pattern` gives
every key its own bytes, so that a replay can verify each byte it reads.
"""

from kvcm_ray.traces.pattern import block_pattern, wrong_bytes
from kvcm_ray.traces.reader import BUNDLED, TraceRequest, bundled, open_trace

__all__ = ["BUNDLED", "TraceRequest", "block_pattern", "bundled", "open_trace", "wrong_bytes"]
