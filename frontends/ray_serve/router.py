"""Ray Serve's choice of a replica, by `affinity.ranks`."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from frontends.ray_serve.affinity import ranks


class AffinityRouter(RequestRouter):
    """Routes by the session id of a handle's call, which is the affinity key, "" for none.

    Ray asks each rank for its least loaded replica, and takes the next rank where none has room.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        """Called by Ray with the `request_router_kwargs`."""
        self._spill_at: int = kwargs["spill_at"]

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        key = None
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # after every rank was asked
            key = pending_request.metadata.session_id or None
        by_name = {each.replica_id.unique_id: each for each in candidate_replicas}
        num_open = {
            name: self.replica_queue_len_cache.get(each.replica_id)
            for name, each in by_name.items()
        }
        return [[by_name[name] for name in rank] for rank in ranks(key, num_open, self._spill_at)]
