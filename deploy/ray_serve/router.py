"""Ray Serve's router of the replicas: prefixes stay where their keys and values are."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ray.serve.request_router import (
    PendingRequest,
    ReplicaID,
    ReplicaResult,
    RequestRouter,
    RunningReplica,
)

from deploy.ray_serve.messages import ProxiedRequest
from deploy.ray_serve.prefix_routing import preference


class PrefixRouter(RequestRouter):
    """Asks ``preference``. Serve takes the first replica of the order that has room.

    Serve forgets a queue's length after 10 s without news, which is short for streams; so those that this
    router has sent are counted here.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        """Called by Serve with ``request_router_kwargs``: ``slack`` and ``free_load`` of ``preference``."""
        self._slack = float(kwargs["slack"])
        self._free_load = int(kwargs["free_load"])
        self._num_running: Counter[str] = Counter()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The candidates, each a rank of its own."""
        asked = pending_request.args[0] if pending_request is not None and pending_request.args else None
        request = asked if isinstance(asked, ProxiedRequest) else None
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        order = preference(
            None if request is None else request.prefix,
            {name: self._load(replica) for name, replica in replicas.items()},
            slack=self._slack,
            free_load=self._free_load,
            avoided=() if request is None else request.avoided,
        )
        return [[replicas[name]] for name in order]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult
    ) -> None:
        self._num_running[replica_id.unique_id] += 1

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._num_running[replica_id.unique_id] -= 1
        if self._num_running[replica_id.unique_id] <= 0:
            del self._num_running[replica_id.unique_id]

    def _load(self, replica: RunningReplica) -> int:
        known = self.replica_queue_len_cache.get(replica.replica_id) or 0
        return max(known, self._num_running[replica.replica_id.unique_id])
