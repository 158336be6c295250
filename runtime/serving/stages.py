"""What each request goes through on one page: tile and tokenise, encode, hand to the decoder.

Owns no algorithm and no loop: who calls what, and from which thread, is loop.py's.
"""

from __future__ import annotations

import threading
import time

import torch

from nvlm.formats import layout
from nvlm.inputs.tiling import TiledImage
from nvlm.inputs.tokenizer import IM_END, Tokenizer
from nvlm.planning.step_limit import decoder_step_limit, vision_limit
from runtime.decoder.executor import DecoderExecutor, DecoderRequest
from runtime.engine.engine_dir import EngineDir
from runtime.engine.mapped_files import MappedFiles
from runtime.requests.text_stream import TextStream
from runtime.serving.prepare import prepare
from runtime.serving.ticket import Ticket
from runtime.vision.executor import VisionExecutor

_CPU = torch.device("cpu")


class Stages:
    """The stages of an opened engine. Each raises what ends the request it was given.

    device: where they run, for how long they may take. mapped: the engine's files that they have
    mapped there, from before they were; None are not looked at.
    """

    def __init__(
        self,
        engine: EngineDir,
        vision: VisionExecutor,
        decoder: DecoderExecutor,
        device: torch.device = _CPU,
        mapped: MappedFiles | None = None,
    ) -> None:
        self.engine = engine
        self.mapped = mapped or MappedFiles(engine, ())
        self.step_limit = decoder_step_limit(engine.checkpoint_config, device)
        self._vision_limit = vision_limit(engine.vision_config, device)
        self.tokenizer = Tokenizer(engine.directory / layout.TOKENIZER)
        self.vision = vision
        self.decoder = decoder
        self.has_failed = False  # a part of its server: what may hang is left alone from then on
        self.in_loop = threading.Lock()  # held by the one loop that is open
        self._encoding = threading.Lock()  # held by the one thread that encodes images

    def prepare(self, ticket: Ticket) -> None:
        """Tiles the images and tokenises the prompt. Any number of threads may do so at once.

        Raises `UserError` for a request this engine cannot answer.
        """
        prepare(self.engine, self.tokenizer, ticket)

    def encode(self, ticket: Ticket) -> None:
        """Makes the decoder's request; runs the vision encoder if there are images, for one thread
        at a time. It need not be the decoder's."""
        if not ticket.images:
            self._encode(ticket)
            return
        with self._encoding:  # waiting for it is no time of vision's
            self._encode(ticket)

    def encode_limit_s(self, ticket: Ticket) -> float:
        """How long encoding a ticket's images never takes."""
        num_tiles = sum(image.num_tiles for image in ticket.images)
        return self._vision_limit.seconds(num_tiles * self.engine.vision_config.num_positions)

    def probe(self) -> None:
        """One step of the decoder for nobody, while it has nothing else to do. Raises what breaks
        in it."""
        request_id = self.decoder.submit(DecoderRequest([0], 1))
        try:
            for output in self.decoder.step():
                if output.request_id == request_id and output.error is not None:
                    raise output.error
        finally:
            self.decoder.cancel(request_id)

    def start(self, ticket: Ticket) -> int:
        """Queues a request in the decoder and returns its id there."""
        ticket.stream = TextStream(self.tokenizer, ticket.request.stop)
        request_id = self.decoder.submit(ticket.decoder_request)
        ticket.submitted = time.perf_counter()
        return request_id

    def _encode(self, ticket: Ticket) -> None:
        begun = time.perf_counter()
        images, request = ticket.images, ticket.request
        tokens_per_tile = self.engine.vision_config.tokens_per_tile
        ticket.decoder_request = DecoderRequest(
            token_ids=ticket.prompt_ids,
            max_new_tokens=request.max_new_tokens,
            prompt_table=self._prompt_table(images),
            cache_keys=tuple(image.cache_key for image in images),
            rows_per_image=tuple(image.num_tiles * tokens_per_tile for image in images),
            stop_ids=request.end_ids | {self.tokenizer.special_id(IM_END)},
            sampling=request.sampling,
        )
        ticket.grids = [image.grid for image in images]
        ticket.num_tiles = sum(image.num_tiles for image in images)
        ticket.images = []  # nobody needs the pixels any more
        ticket.vision_s = time.perf_counter() - begun

    def _prompt_table(self, images: list[TiledImage]) -> torch.Tensor | None:
        """[num_virtual_tokens, hidden_size]: all tiles' embeddings in order."""
        if not images:
            return None
        tiles = torch.cat([torch.from_numpy(image.tiles) for image in images])
        table = self.vision.encode(tiles).flatten(0, 1)
        if table.is_cuda:  # what is launched is not yet done, and its time is vision's
            torch.cuda.current_stream(table.device).synchronize()
        return table
