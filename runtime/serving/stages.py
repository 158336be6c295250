"""What each request goes through on one page: tile and tokenise, encode, hand to the decoder.

Owns no algorithm and no loop: who calls what, and from which thread, is loop.py's.
"""

from __future__ import annotations

import threading
import time

import torch

from nvlm.formats import layout
from nvlm.inputs.picture_budget import PictureBudget
from nvlm.inputs.tiling import TiledImage
from nvlm.inputs.tokenizer import IM_END, Tokenizer
from runtime.decoder.executor import DecoderExecutor, DecoderRequest
from runtime.engine.engine_dir import EngineDir
from runtime.requests.text_stream import TextStream
from runtime.serving.prepare import prepare
from runtime.serving.ticket import Ticket
from runtime.vision.executor import VisionExecutor


class Stages:
    """The stages of an opened engine. Each raises what ends the request it was given."""

    def __init__(self, engine: EngineDir, vision: VisionExecutor, decoder: DecoderExecutor) -> None:
        self.engine = engine
        self.tokenizer = Tokenizer(engine.directory / layout.TOKENIZER)
        self.vision = vision
        self.decoder = decoder
        self.in_loop = threading.Lock()  # held by the one loop that is open
        self._pictures = PictureBudget()  # of all threads that prepare
        self._encoding = threading.Lock()  # held by the one thread that encodes images

    def prepare(self, ticket: Ticket) -> None:
        """Tiles the images and tokenises the prompt. Any number of threads may do so at once.

        Raises `UserError` for a request this engine cannot answer.
        """
        prepare(self.engine, self.tokenizer, ticket, self._pictures)

    def encode(self, ticket: Ticket) -> None:
        """Makes the decoder's request; runs the vision encoder if there are images, for one thread
        at a time. It need not be the decoder's."""
        if not ticket.images:
            self._encode(ticket)
            return
        with self._encoding:  # waiting for it is no time of vision's
            self._encode(ticket)

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
