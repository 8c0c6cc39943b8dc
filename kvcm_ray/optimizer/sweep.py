"""Many capacities and policies: one replay each, side by side.

What LRU hits at every capacity comes from one pass over the trace (`lru_hits`), where that is exact.
The other replays are compiled and run in threads; traces without compiled replays (`replay`) go through
the live policies' Python code, in processes. With a Ray address they are Ray tasks, wherever that
cluster has processors; the trace is put into its object store once.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from itertools import chain
from multiprocessing import get_context
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcm_ray.errors import InvalidArgument, Unavailable, Unsupported
from kvcm_ray.optimizer.accesses import I32, Accesses
from kvcm_ray.optimizer.curve import stack_distances
from kvcm_ray.optimizer.replay import check, replay, times_us, totals

Measure = Callable[[Accesses, I32], Any]
Progress = Callable[[int, int], None]
_Wanted = tuple[str, int]  #: policy and capacity
_Results = Iterator[tuple[_Wanted, Any]]

_CONNECT_S = 5.0
_HITS_MAX = 1 << 26  #: numbers of hits that one pass keeps at a time


@dataclass(frozen=True, slots=True)
class Point:
    policy: str
    capacity: int  #: blocks
    measured: Any  #: what `measure` made of the hits


@dataclass(frozen=True, slots=True)
class _Job:
    """How one point is measured."""

    partial_first: bool
    ttl_s: float
    measure: Measure

    def run(self, accesses: Accesses, policy: str, capacity: int) -> Any:
        hits = replay(accesses, policy, capacity, partial_first=self.partial_first, ttl_s=self.ttl_s)
        return self.measure(accesses, hits)


def sweep(
    accesses: Accesses,
    policies: Sequence[str],
    capacities: Sequence[int],
    *,
    partial_first: bool = False,
    ttl_s: float = 0,
    measure: Measure = totals,
    ray_address: str | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> list[Point]:
    """Every policy at every capacity: policy by policy, capacities in the order given.

    Args:
        partial_first, ttl_s: as `replay`.
        measure: called with the trace and the hit blocks of each request, where the replay ran. Where that
            is another process it must be a function of a module, and what it returns must be picklable.
        ray_address: "auto" (the cluster that runs here), "local" (one for this call), or an address. If
            this process is connected to a cluster already, that one is used.
        workers: threads or processes; as many as there are processors by default. Not with Ray.
        progress: called in this thread with how many points are done, and of how many.

    Raises:
        InvalidArgument: as `replay`, or no such number of workers.
        Unavailable: no Ray cluster can be reached at that address.
        Unsupported: numba, or Ray, is not installed.
    """
    if workers is not None and workers < 1:
        raise InvalidArgument(f"a sweep needs at least one worker, not {workers}")
    points = [(policy, int(capacity)) for policy in policies for capacity in capacities]
    for policy, capacity in points:
        check(policy, capacity, ttl_s)
    distinct = list(dict.fromkeys(points))
    in_one_pass = {point for point in distinct if point[0] in ("lru", "ttl")}
    if not accesses.whole or not accesses.chained or (partial_first and accesses.partial.any()):
        in_one_pass = set()
    job = _Job(partial_first, ttl_s, measure)
    rest = [point for point in distinct if point not in in_one_pass]
    results = chain(
        _of_one_pass(accesses, job, sorted(in_one_pass)), _replayed(accesses, job, rest, ray_address, workers)
    )
    found = {}
    for done, (point, measured) in enumerate(results, 1):
        found[point] = measured
        if progress:
            progress(done, len(distinct))
    return [Point(*point, found[point]) for point in points]


def lru_hits(accesses: Accesses, capacities: Sequence[int], *, ttl_s: float = 0) -> npt.NDArray[np.int32]:
    """Hit blocks of each request at each capacity, ``(len(capacities), n)``, from one pass.

    The same as `replay` gives for a chained trace of whole requests. A time to live takes away what is
    last in the stack anyway, so that it changes no rank of what is left.

    Raises:
        InvalidArgument: as `curve.stack_distances`, or the time is negative.
    """
    from kvcm_ray.optimizer.kernels import replay as kernels

    for capacity in capacities:
        check("lru", capacity, ttl_s)
    increasing, place = np.unique(np.array(capacities, np.int64), return_inverse=True)
    hits = kernels.hits_at(stack_distances(accesses), accesses.offsets, increasing)
    if ttl_us := round(ttl_s * 1e6):
        times = times_us(accesses)
        ends = kernels.first_expired(accesses.blocks, accesses.offsets, times, accesses.unique, ttl_us)
        np.minimum(hits, ends - accesses.offsets[:-1], out=hits, casting="same_kind")
    return hits[place]


def _of_one_pass(accesses: Accesses, job: _Job, points: Sequence[_Wanted]) -> _Results:
    step = max(1, _HITS_MAX // max(1, accesses.requests))
    for start in range(0, len(points), step):
        part = points[start : start + step]
        for point, hits in zip(part, lru_hits(accesses, [c for _, c in part], ttl_s=job.ttl_s), strict=True):
            yield point, job.measure(accesses, hits)


def _replayed(
    accesses: Accesses, job: _Job, points: Sequence[_Wanted], ray_address: str | None, workers: int | None
) -> _Results:
    if not points:
        return
    if ray_address is not None:
        with _connected(ray_address):
            yield from _by_tasks(accesses, job, points)
        return
    compiled = accesses.chained or {policy for policy, _ in points} == {"lru_head_first"}
    workers = min(workers or os.cpu_count() or 1, len(points))
    if compiled or workers == 1:
        with _closing(ThreadPoolExecutor(workers)) as pool:
            threads = {pool.submit(job.run, accesses, *point): point for point in points}
            yield from ((threads[future], future.result()) for future in as_completed(threads))
        return
    # Not forked: threads of numba or Ray may hold locks that the child would wait for.
    with _closing(ProcessPoolExecutor(workers, get_context("spawn"), _receive, (accesses, job))) as pool:
        processes = {pool.submit(_run_received, *point): point for point in points}
        yield from ((processes[future], future.result()) for future in as_completed(processes))


@contextmanager
def _closing(pool: Executor) -> Iterator[Executor]:
    """If anything goes wrong, what was not begun is given up."""
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


_received: list[tuple[Accesses, _Job]] = []  #: in a worker process: what it works on


def _receive(accesses: Accesses, job: _Job) -> None:
    _received[:] = [(accesses, job)]


def _run_received(policy: str, capacity: int) -> Any:
    accesses, job = _received[0]
    return job.run(accesses, policy, capacity)


# ----------------------------------------------------------------------------------------- Ray


@contextmanager
def _connected(address: str) -> Iterator[None]:
    try:
        import ray
    except ImportError as error:
        raise Unsupported("a sweep on Ray needs Ray", hint="pip install 'kvcm-ray[ray]'") from error
    if ray.is_initialized():
        yield
        return
    try:
        _answers(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    except (OSError, RuntimeError, ValueError) as error:
        hint = "Start a cluster there, or use 'local' to have one for this call."
        raise Unavailable(f"no Ray cluster at {address!r}: {error}", hint=hint) from error
    try:
        yield
    finally:
        ray.shutdown()


def _answers(address: str) -> None:
    """Raises OSError if nobody listens at ``host:port``: Ray would go on asking for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()


def _by_tasks(accesses: Accesses, job: _Job, points: Sequence[_Wanted]) -> _Results:
    import ray

    task = ray.remote(num_cpus=1)(_run_task)
    trace = ray.put(accesses)
    pending = {task.remote(trace, job, *point): point for point in points}
    while pending:
        for reference in ray.wait(list(pending), num_returns=1)[0]:
            yield pending.pop(reference), ray.get(reference)


def _run_task(accesses: Accesses, job: _Job, policy: str, capacity: int) -> Any:
    return job.run(_own(accesses), policy, capacity)


def _own(accesses: Accesses) -> Accesses:
    """A copy: arrays of the object store cannot be written to, and the compiled replays, which numba makes
    for each type of arrays, would be compiled once more for such."""
    values = {field.name: getattr(accesses, field.name) for field in fields(accesses)}
    copies: dict[str, Any] = {k: v.copy() for k, v in values.items() if isinstance(v, np.ndarray)}
    return replace(accesses, **copies)
