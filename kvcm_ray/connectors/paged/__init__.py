"""Paged KV caches of engines, and blocks of storage: copies between the two, on CPUs and GPUs.

An engine keeps keys and values in *pages*, scattered over tensors: one a layer, or one for keys and one for
values, or a slice of a pool. A storage keeps *blocks*: one run of bytes each. `PagedCache` describes both,
`gather` makes blocks of pages and `scatter` pages of blocks, bit for bit, whatever the numbers are.

Three ways do the same: numpy (host memory), torch (tensors anywhere) and one Triton kernel (on a GPU).
`host` puts a side stream between a GPU's cache and the host; `pinned` registers memory with the driver.
"""

from kvcm_ray.connectors.paged.cache import LAYER_FIRST, PAGE_FIRST, Order, PagedCache, Plane, planes_of
from kvcm_ray.connectors.paged.copying import WAYS, gather, scatter, way_of

__all__ = [
    "LAYER_FIRST",
    "PAGE_FIRST",
    "WAYS",
    "Order",
    "PagedCache",
    "Plane",
    "gather",
    "planes_of",
    "scatter",
    "way_of",
]
