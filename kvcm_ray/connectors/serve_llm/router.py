"""`KVCMRequestRouter`: the class that Serve makes in every process that holds a handle to the deployment.

`choose_replicas` answers at once from memory and the index. What is done with it is up to Serve: of the
first rank it takes the replica with the shortest queue that accepts, else one of the second rank, which holds
two random replicas. Whatever fails in here leaves only those two. Counted in Ray's metrics:
``kvcm_router_decisions`` by reason (prefix, default, failed) and ``kvcm_router_decision_ms``.
"""

from __future__ import annotations

import logging
import random
import time
import weakref
from typing import Any

from ray.serve.request_router import (
    LocalityMixin,
    MultiplexMixin,
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)
from ray.util import metrics

from kvcm_ray.connectors.serve_llm.choice import Candidate, best
from kvcm_ray.connectors.serve_llm.learning import Learner
from kvcm_ray.connectors.serve_llm.prompts import PIECE, Prompt, prompt_of
from kvcm_ray.connectors.serve_llm.running import Running
from kvcm_ray.connectors.serve_llm.settings import RouterSettings, router_settings
from kvcm_ray.connectors.serve_llm.shared import SharedIndex
from kvcm_ray.connectors.serve_llm.table import Found, PrefixTable

log = logging.getLogger("ray.serve")

TELL_S = 60.0  #: between two lines in the log about failed decisions
DECISION_MS = [0.05, 0.1, 0.2, 0.5, 1, 2, 5, 20, 100]

Ranks = list[list[RunningReplica]]


class KVCMRequestRouter(LocalityMixin, MultiplexMixin, RequestRouter):
    """See the text of `kvcm_ray.connectors.serve_llm` for how to configure it."""

    def __init__(self, **given: Any) -> None:
        """Serve gives all by keyword."""
        super().__init__(**given)
        self._node: str | None = given.get("self_node_id")

    def initialize_state(self, **settings: Any) -> None:
        """Called by Serve with ``request_router_kwargs``. Raises InvalidArgument."""
        self._settings: RouterSettings = router_settings(settings)
        self._table = PrefixTable(self._settings.table_entries, self._settings.memory_s)
        self._shared: SharedIndex | None = None
        self._learner: Learner | None = None
        if self._settings.kvcm_data_dir:
            self._shared = SharedIndex(
                self._settings.kvcm_data_dir, self._settings.instance_id,
                slow_s=self._settings.budget_ms / 1000,
            )  # fmt: skip
            self._learner = Learner(self._settings, self._table, self._shared)
            self._learner.start()
            weakref.finalize(self, self._learner.close)
        self._running = Running()
        self._tell_at = 0.0
        self._decisions = metrics.Counter(
            "kvcm_router_decisions", description="Prompts routed, by reason.", tag_keys=("reason",)
        )
        self._times = metrics.Histogram(
            "kvcm_router_decision_ms", description="Time of a decision.", boundaries=DECISION_MS
        )

    # ------------------------------------------------------------------------------- decisions

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> Ranks:
        """Ranks of replicas; see `RequestRouter.choose_replicas`."""
        candidates = self._candidates(candidate_replicas, pending_request)
        default = random.sample(candidates, min(2, len(candidates)))
        if pending_request is None or len(candidates) < 2:
            return [default] if default else []
        begin = time.perf_counter()
        try:
            chosen = self._by_prefix(candidates, pending_request, begin)
            reason = "prefix" if chosen else "default"
        except Exception:  # a router never breaks serving
            chosen, reason = [], "failed"
            self._tell("a decision failed; the default was taken")
        self._times.observe((time.perf_counter() - begin) * 1000)
        self._decisions.inc(tags={"reason": reason})
        return [chosen, default] if chosen else [default]

    def _candidates(self, replicas: list[RunningReplica], request: PendingRequest | None) -> Any:
        """Those that Serve's own rules leave: of a LoRA adapter's, or of the same node, first."""
        if request is not None and request.metadata.multiplexed_model_id:
            names = self.apply_multiplex_routing(pending_request=request)
        else:
            names = self.apply_locality_routing(pending_request=request)
        return [replica for replica in replicas if replica.replica_id in names]

    def _by_prefix(
        self, candidates: list[RunningReplica], request: PendingRequest, begin: float
    ) -> list[RunningReplica]:
        prompt = prompt_of(request.args)
        if prompt is None or not prompt.hashes:
            return []
        found = self._table.find(prompt.hashes, time.monotonic())
        if found.is_nothing:
            return []
        shared = self._shared_pieces(prompt, found, begin)
        by_id = {_name(replica.replica_id): replica for replica in candidates}
        chosen = best(
            [self._candidate(name, replica, found) for name, replica in by_id.items()],
            pieces=len(prompt.hashes), shared=shared,
            least=self._settings.min_match_chars / PIECE,
            queue_pieces=self._settings.queue_chars / PIECE,
        )  # fmt: skip
        return [by_id[name] for name in chosen]

    def _shared_pieces(self, prompt: Prompt, found: Found, begin: float) -> float:
        """Leading pieces of the prompt that the shared cache holds, as far as time allows to say."""
        if self._shared is None or not len(found.keys):
            return 0.0
        if (time.perf_counter() - begin) * 1000 > self._settings.budget_ms:
            return 0.0
        length = self._shared.length(found.keys)
        return found.keys_pieces * length / len(found.keys)

    def _candidate(self, name: str, replica: RunningReplica, found: Found) -> Candidate:
        here = replica.node_id == self._node
        worth = self._settings.shared_worth if here else self._settings.remote_worth
        return Candidate(name, self._queue(name, replica), found.pieces.get(name, 0), worth)

    def _queue(self, name: str, replica: RunningReplica) -> int:
        """Requests that a replica has, as Serve knows; at least those that this router sent."""
        known = self._replica_queue_len_cache.get(replica.replica_id)
        return max(known or 0, self._running.count(name))

    def _tell(self, what: str) -> None:
        now = time.monotonic()
        if now >= self._tell_at:
            self._tell_at = now + TELL_S
            log.warning("kvcm: %s", what, exc_info=True)

    # ---------------------------------------------------------------------- what Serve tells us

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """The replica has accepted: from now on it has the prompt's blocks."""
        try:
            name = _name(replica_id)
            self._running.began(pending_request.metadata.internal_request_id, name)
            prompt = prompt_of(pending_request.args)
            if prompt is not None and prompt.hashes:
                self._table.served(prompt.hashes, name, time.monotonic())
                # Block keys of an adapter's prompts are others than those of the plain model's.
                if self._learner is not None and not pending_request.metadata.multiplexed_model_id:
                    self._learner.learn(prompt)
        except Exception:  # the request goes on
            self._tell("a routed prompt was not remembered")

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """It has ended, well or not."""
        self._running.ended(internal_request_id, _name(replica_id))

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """The deployment's replicas are these now."""
        before = {_name(replica_id) for replica_id in self._replica_id_set}
        super().update_replicas(replicas)
        for name in before - {_name(replica.replica_id) for replica in replicas}:
            self._gone(name)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Its blocks went with it."""
        super().on_replica_actor_died(replica_id)
        self._gone(_name(replica_id))

    def _gone(self, name: str) -> None:
        self._table.forget(name)
        self._running.gone(name)


def _name(replica_id: ReplicaID) -> str:
    return str(replica_id.to_full_id_str())
