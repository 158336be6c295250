"""Opens the parts of a synthetic engine on all ranks of a job, for the phases of bench/hopper."""

from __future__ import annotations

from bench.hopper.parts import load_vision
from bench.synthetic_engine import decoder_source
from runtime.decoder.torch_executor import TorchDecoderExecutor
from runtime.engine.engine_dir import EngineDir
from runtime.ranks.parallel_decoder import open_parallel_model
from runtime.ranks.parallel_vision import ParallelVisionExecutor
from runtime.ranks.process_group import ProcessGroup


class Ranks:
    """`Parts` of the leader. On a worker its construction is all: what the leader opens, the
    worker's `group.follow` opens too. One decoder at a time."""

    def __init__(self, group: ProcessGroup, *, use_graphs: bool, use_peer_memory: bool) -> None:
        self.device, self.num_ranks = group.device, group.size
        self._group = group
        self._use_graphs, self._use_peer_memory = use_graphs, use_peer_memory
        self._decoder: TorchDecoderExecutor | None = None
        group.on("open vision", lambda message: self._open_vision(*message))
        group.on("open decoder", self._open_decoder)

    def vision(
        self, engine: EngineDir, precision: str, slice_ms: float = 0.0
    ) -> ParallelVisionExecutor:
        with self._group.leading("open vision", (engine, precision)):
            return self._open_vision(engine, precision)

    def decoder(self, engine: EngineDir) -> TorchDecoderExecutor:
        assert self._decoder is None, "the workers would follow the last one"
        with self._group.leading("open decoder", engine):
            self._decoder = self._open_decoder(engine)
        return self._decoder

    def close(self) -> None:
        """Ends the workers' `follow`. The leader calls it."""
        if self._decoder is None:
            self._group.close()
        else:
            self._decoder.close()

    def _open_vision(self, engine: EngineDir, precision: str) -> ParallelVisionExecutor:
        own = load_vision(engine, precision, self.device)
        own.warm_up()
        return ParallelVisionExecutor(own, self._group, engine.tiling.image_size)

    def _open_decoder(self, engine: EngineDir) -> TorchDecoderExecutor:
        source = decoder_source(engine, self.device, self._group.rank)
        opened = open_parallel_model(
            engine,
            self.device,
            self._group,
            source,
            use_graphs=self._use_graphs,
            use_peer_memory=self._use_peer_memory,
        )
        return TorchDecoderExecutor.over(engine, opened)
