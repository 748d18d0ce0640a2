"""Ray Serve's router for `routing: prefix`: its consistent-hash ring, with the bound of routing.py.

Ray's own PrefixCacheAffinityRouter is not used: it keeps every prompt as plain text in a detached actor and asks it
with blocking calls, which would hold up all streams of the gateway.
"""

from typing import Any

from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter

from raylm.serving.routing import bounded

_ALL = 1_000_000


class PrefixRouter(ConsistentHashRouter):
    """Routes by the `session_id` of the handle's call; a call without one goes anywhere."""

    def initialize_state(self, **options: Any) -> None:
        """Every replica is a possible fallback."""
        super().initialize_state(num_fallback_replicas=_ALL, **options)

    async def choose_replicas(self, candidate_replicas: list[Any], pending_request: Any = None) -> list[list[Any]]:
        """Replicas one by one, best first; Serve takes the first that accepts."""
        ranks = await super().choose_replicas(candidate_replicas, pending_request)
        ring = [replica for rank in ranks for replica in rank]
        if len(ring) < 2 or pending_request is None:
            return ranks
        queued = {replica: self.replica_queue_len_cache.get(replica.replica_id) or 0 for replica in ring}
        return [[replica] for replica in bounded(ring, queued)]
