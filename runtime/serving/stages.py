"""What each request goes through on one page: tile and tokenise, encode, hand to the decoder.

Owns no algorithm and no loop: who calls what, and from which thread, is loop.py's.
"""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import torch

from nvlm.formats import layout
from nvlm.inputs.picture_budget import PictureBudget
from nvlm.inputs.tiling import TiledImage
from nvlm.inputs.tokenizer import IM_END, Tokenizer
from nvlm.planning.step_limit import decoder_step_limit, vision_limit
from runtime.decoder.executor import DecoderExecutor, DecoderRequest
from runtime.decoder.guidance import Guidance
from runtime.engine.engine_dir import EngineDir
from runtime.engine.mapped_files import MappedFiles
from runtime.requests.text_stream import TextStream
from runtime.serving.encoded_pictures import EncodedPictures
from runtime.serving.prepare import compile_guide, prepare
from runtime.serving.ticket import Draft, Ticket
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
        self.engine, self.device = engine, device
        self.mapped = mapped or MappedFiles(engine, ())
        self.step_limit = decoder_step_limit(engine.checkpoint_config, device)
        self._vision_limit = vision_limit(engine.vision_config, device)
        self.tokenizer = Tokenizer(engine.directory / layout.TOKENIZER)
        self.guidance = Guidance(self.tokenizer, engine.checkpoint_config.decoder.vocab_size)
        self.vision = vision
        self.decoder = decoder
        self.in_loop = threading.Lock()  # held by the one loop that is open
        self.picture_budget = PictureBudget()  # of all threads that prepare
        self._encoding = threading.Lock()  # held by the one thread that encodes images
        self._encoded = EncodedPictures()
        self.num_pictures = self.num_known_pictures = 0  # that were to be encoded; and had been
        self.vision_s = 0.0  # in which pictures were encoded
        self._table_device = _CPU  # vision's, once it has encoded

    def prepare(self, ticket: Ticket) -> None:
        """Compiles the guide, tiles the images and tokenises the prompt. Any number of threads may
        do so at once.

        Raises `UserError` for a request this engine cannot answer.
        """
        compile_guide(self.engine, self.guidance, ticket)
        prepare(self.engine, self.tokenizer, ticket, self.picture_budget)

    def encode(self, ticket: Ticket) -> None:
        """Makes the decoder's request; runs the vision encoder if there are images, for one thread
        at a time. It need not be the decoder's."""
        images, request, sampling = ticket.images, ticket.request, ticket.sampling
        end = self.tokenizer.special_id(IM_END)
        tokens_per_tile = self.engine.vision_config.tokens_per_tile
        table: torch.Tensor | None = None
        if images:
            with self._encoding:
                begun = time.perf_counter()
                table = self._prompt_table(images, ticket.cache_keys)
                ticket.vision_s = time.perf_counter() - begun
                self.vision_s += ticket.vision_s
        ticket.decoder_request = DecoderRequest(
            token_ids=ticket.prompt_ids,
            max_new_tokens=request.max_new_tokens,
            prompt_table=table,
            cache_keys=ticket.cache_keys,
            rows_per_image=tuple(image.num_tiles * tokens_per_tile for image in images),
            stop_ids=request.end_ids if sampling.ignore_eos else request.end_ids | {end},
            sampling=sampling,
            bad_words=bad_word_ids(self.tokenizer, sampling.bad_words),
            guide=request.guide,
            compiled_guide=ticket.compiled_guide,
        )
        ticket.grids = [image.grid for image in images]
        ticket.num_tiles = sum(image.num_tiles for image in images)
        ticket.images = []  # nobody needs the pixels any more

    def encode_limit_s(self, ticket: Ticket) -> float:
        """How long encoding a ticket's images never takes."""
        num_tiles = sum(image.num_tiles for image in ticket.images)
        return self._vision_limit.seconds(num_tiles * self.engine.vision_config.num_positions)

    def forget_pictures(self) -> None:
        """As if none had been encoded; none is being encoded."""
        self._encoded = EncodedPictures()
        self.num_pictures = self.num_known_pictures = 0
        self.vision_s = 0.0

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

    def start(self, ticket: Ticket) -> dict[int, Draft]:
        """Queues a request in the decoder: its drafts, one for each of the n answers, by their ids
        there. All but the first share the blocks of its prompt."""
        request, sampling = ticket.request, ticket.sampling
        started: dict[int, Draft] = {}
        first: int | None = None
        try:
            for index in range(sampling.n):
                own = sampling.with_seed_of(index)
                if index > 0:
                    own = replace(own, prompt_logprobs=None)  # the first draft's
                asked = replace(ticket.decoder_request, sampling=own, same_prompt_as=first)
                request_id = self.decoder.submit(asked)
                first = request_id if first is None else first
                stream = TextStream(
                    self.tokenizer, request.stop, keeps_stop=sampling.include_stop_str_in_output
                )
                seed = None if own.is_greedy else own.seed
                started[request_id] = Draft(ticket, index, seed, self.tokenizer, stream)
        except BaseException:
            for request_id in started:
                self.decoder.cancel(request_id)
            raise
        ticket.drafts = list(started.values())
        ticket.submitted = time.perf_counter()
        return started

    def _prompt_table(self, images: list[TiledImage], keys: tuple[bytes, ...]) -> torch.Tensor:
        """[num_virtual_tokens, hidden_size]: all tiles' embeddings in order. Pictures that were
        encoded before are not encoded again."""
        known = {key: rows for key in keys if (rows := self._encoded.get(key)) is not None}
        self.num_pictures += len(keys)
        self.num_known_pictures += sum(key in known for key in keys)
        new = {key: image for key, image in zip(keys, images, strict=True) if key not in known}
        if new:
            tiles = torch.cat([torch.from_numpy(image.tiles) for image in new.values()])
            table = self.vision.encode(tiles).flatten(0, 1)
            self._table_device = table.device
            tokens_per_tile = self.engine.vision_config.tokens_per_tile
            counts = [image.num_tiles * tokens_per_tile for image in new.values()]
            for key, rows in zip(new, table.split(counts), strict=True):
                known[key] = rows
                self._encoded.put(key, rows)
        if len(new) < len(images):
            table = torch.cat([known[key].to(self._table_device) for key in keys])
        if table.is_cuda:  # what is launched is not yet done, and its time is vision's
            torch.cuda.current_stream(table.device).synchronize()
        return table


def bad_word_ids(tokenizer: Tokenizer, words: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    """The tokens of each word, at the beginning of a text and after a space."""
    texts = [text for word in words for text in (word, f" {word.lstrip(' ')}")]
    return tuple(dict.fromkeys(tuple(tokenizer.encode(text)) for text in texts))
