"""Memory of every rank's GPU that all ranks of a machine map: NVLink carries what they say there.

torch's symmetric memory maps it. Multicast (NVLS) stays off: the kernels need none.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from nvlm.formats.checkpoint_config import CheckpointConfig
from nvlm.planning import hopper
from nvlm.planning.limits import EngineLimits
from nvlm.planning.peer_memory import (
    MAX_PROGRAMS,
    MAX_RANKS,
    peer_memory_bytes,
    places,
)
from runtime.engine.engine_dir import EngineDir
from runtime.ranks.process_group import ProcessGroup


def maps_peers(group: ProcessGroup) -> bool:
    """Collective. Whether all ranks are GPUs of one machine that read one another's memory."""
    device, world = group.device, group.job.world
    can = device.type == "cuda" and world.local_size == world.size <= MAX_RANKS
    if can:
        # A launcher may show each rank its own GPU alone; of GPUs out of sight nothing is known.
        others = (i for i in range(torch.cuda.device_count()) if i != device.index)
        can = all(torch.cuda.can_device_access_peer(device, other) for other in others)
    return all(group.job.gather(can))


class PeerMemory:
    """What the ranks' kernels share; nvlm/planning/peer_memory.py says what is where.

    parts: by rank, the two places for parts of its sums. norms, logits, tokens: this rank's.
    """

    def __init__(self, group: ProcessGroup, config: CheckpointConfig, limits: EngineLimits) -> None:
        """Collective."""
        from torch.distributed import _symmetric_memory

        from runtime.kernels.peers import Peers

        self._group = group
        device, where = group.device, places(config, limits)
        num_bytes = peer_memory_bytes(config, limits)
        own = _symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)
        own.zero_()
        torch.cuda.synchronize(device)  # no rank raises a flag before all are cleared
        default_group = dist.distributed_c10d._get_default_group()
        self._handle = _symmetric_memory.rendezvous(own, default_group)  # keeps what is mapped
        get, whole = self._handle.get_buffer, (num_bytes,)
        pieces = [get(rank, whole, torch.uint8) for rank in range(group.size)]

        def view(piece: torch.Tensor, name: str) -> torch.Tensor:
            place = where[name]
            return piece[place.offset : place.end].view(place.dtype).view(place.shape)

        self.parts = [view(piece, "parts") for piece in pieces]
        self.norms = view(own, "norms")
        self.logits, self.tokens = view(own, "logits"), view(own, "tokens")
        distances = [piece.data_ptr() - own.data_ptr() for piece in pieces]
        self.peers = Peers(
            rank=group.rank,
            num_ranks=group.size,
            distances=torch.tensor(distances, dtype=torch.int64, device=device),
            flags=view(own, "flags"),
            epochs=torch.zeros(MAX_PROGRAMS, dtype=torch.int32, device=device),
        )

    @classmethod
    def open(
        cls, engine: EngineDir, device: torch.device, group: ProcessGroup
    ) -> PeerMemory | None:
        """Collective. None on ranks that cannot map one another's memory, and off the fast path."""
        config = engine.checkpoint_config
        if not hopper.takes_fast_path(config, device) or not maps_peers(group):
            return None
        return cls(group, config, engine.limits)

    def gather_columns(self, columns: torch.Tensor) -> torch.Tensor:
        """Collective. As `ProcessGroup.gather_columns`; what is returned is whole on the leader.
        More rows than a batch has, as a prompt's log probabilities take, go by the group."""
        from runtime.decoder.kernels.rank_exchange import gather_columns

        if columns.numel() * self._group.size > self.logits.numel():
            whole = self._group.gather_columns(columns)
            return columns if whole is None else whole
        return gather_columns(self.peers, columns, self.logits)

    def broadcast_tokens(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Collective. The leader's [n] int64, on every rank."""
        from runtime.decoder.kernels.rank_exchange import share_tokens

        return share_tokens(self.peers, token_ids, self.tokens)
