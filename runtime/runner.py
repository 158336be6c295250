"""The whole path on one page: tile -> encode -> prompt -> table -> generate.

Owns no algorithm. Requests may be submitted at any time; those under way share every step.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nvlm.errors import UserError
from nvlm.inputs.images import load_image
from nvlm.inputs.prompt import ImageSlot, Prompt, build_prompt
from nvlm.inputs.tiling import Grid, TiledImage, normalize, tile_image
from nvlm.inputs.tokenizer import IM_END, Tokenizer
from runtime.boxes import parse_boxes
from runtime.decoder.executor import (
    DecoderExecutor,
    DecoderOptions,
    DecoderRequest,
    FinishReason,
    StepOutput,
    create_decoder_executor,
    require_ranks_supported,
)
from runtime.engine_dir import EngineDir
from runtime.engine_packages import require_packages
from runtime.mpi import World, require_world_size
from runtime.text_stream import TextStream
from runtime.types import GenerationRequest, GenerationResult, TextDelta, Timings
from runtime.vision.executor import VisionExecutor, create_vision_executor


@dataclass(slots=True)
class _Answer:
    """One request under way: what it took to submit it and what has come back."""

    stream: TextStream
    num_prompt_tokens: int
    grids: list[Grid]
    num_tiles: int
    started: float
    tiled: float
    encoded: float
    first_token: float | None = None
    token_ids: list[int] = field(default_factory=list)


class Runner:
    def __init__(self, engine: EngineDir, vision: VisionExecutor, decoder: DecoderExecutor) -> None:
        self.engine = engine
        self.tokenizer = Tokenizer(engine.directory / "tokenizer")
        self.vision = vision
        self.decoder = decoder
        self._answers: dict[int, _Answer] = {}

    @classmethod
    def open(
        cls,
        engine_dir: Path,
        device: torch.device,
        world: World | None = None,
        options: DecoderOptions | None = None,
    ) -> Runner:
        """Loads an engine directory onto a device; `world` is the ranks that run, if several."""
        engine = EngineDir.read(engine_dir)
        require_ranks_supported(engine)
        config = engine.checkpoint_config
        require_world_size(world or World(), config.tp_size, config.pp_size)
        require_packages(engine, device)
        vision = create_vision_executor(engine, device)
        return cls(engine, vision, create_decoder_executor(engine, device, options))

    def submit(self, request: GenerationRequest) -> int:
        """Tiles and encodes the images and queues the prompt; returns the request's id.

        Raises `UserError` for a request this engine cannot answer.
        """
        started = time.perf_counter()
        content = self._tile(request)
        images = [part for part in content if isinstance(part, TiledImage)]
        prompt = self._prompt(request, content)
        tiled = time.perf_counter()
        table = self._encode(images)
        encoded = time.perf_counter()
        tokens_per_tile = self.engine.vision.vision.tokens_per_tile
        request_id = self.decoder.submit(
            DecoderRequest(
                token_ids=prompt.token_ids,
                max_new_tokens=request.max_new_tokens,
                prompt_table=table,
                cache_keys=tuple(image.cache_key for image in images),
                image_rows=tuple(image.num_tiles * tokens_per_tile for image in images),
                stop_ids=frozenset({self.tokenizer.special_id(IM_END)}),
                sampling=request.sampling,
            )
        )
        self._answers[request_id] = _Answer(
            stream=TextStream(self.tokenizer, request.stop),
            num_prompt_tokens=len(prompt.token_ids),
            grids=[image.grid for image in images],
            num_tiles=sum(image.num_tiles for image in images),
            started=started,
            tiled=tiled,
            encoded=encoded,
        )
        return request_id

    def step(self) -> list[TextDelta]:
        """One token for every request under way; empty when there is none."""
        return [
            self._take(output)
            for output in self.decoder.step()
            if output.request_id in self._answers  # a stop string may have ended it in this step
        ]

    def cancel(self, request_id: int) -> None:
        """Frees the request's place; no more comes of it."""
        self.decoder.cancel(request_id)
        self._answers.pop(request_id, None)

    def generate(self, request: GenerationRequest) -> GenerationResult:
        """Answers one request."""
        for _, result in self.generate_batch([request]):
            if isinstance(result, GenerationResult):
                return result
            raise result
        raise AssertionError("a batch of one gives one result")

    def generate_batch(
        self, requests: Iterable[GenerationRequest]
    ) -> Iterator[tuple[int, GenerationResult | UserError]]:
        """Answers requests as they finish: (index, result or what was wrong with the request).

        Requests are taken one by one, just ahead of a free place in the batch.
        """
        under_way: dict[int, int] = {}  # request id -> index
        remaining = enumerate(requests)
        try:
            while True:
                while len(under_way) < self.engine.limits.max_batch_size:
                    try:
                        index, request = next(remaining)
                    except StopIteration:
                        break
                    try:
                        under_way[self.submit(request)] = index
                    except UserError as error:
                        yield index, error
                if not under_way:
                    return
                for delta in self.step():
                    if delta.error is not None and delta.request_id in under_way:
                        yield under_way.pop(delta.request_id), delta.error
                    if delta.result is not None and delta.request_id in under_way:
                        yield under_way.pop(delta.request_id), delta.result
        finally:  # the caller may stop listening
            for request_id in under_way:
                self.cancel(request_id)

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.vision.close()
        self.decoder.close()

    def _tile(self, request: GenerationRequest) -> list[str | TiledImage]:
        tiling, limits = self.engine.vision.tiling, self.engine.limits
        num_images = sum(not isinstance(part, str) for part in request.content)
        if num_images > limits.max_num_images:
            raise UserError(
                f"the request has {num_images} images, the engine takes {limits.max_num_images}; "
                "build it with a larger --max_num_images"
            )
        max_num_tiles = request.max_num_tiles
        if max_num_tiles is None:
            max_num_tiles = tiling.max_num_tiles
        if not 1 <= max_num_tiles <= tiling.max_num_tiles:
            raise UserError(
                f"max_num_tiles is {max_num_tiles}, expected 1 to {tiling.max_num_tiles}"
            )
        return [
            part
            if isinstance(part, str)
            else tile_image(load_image(part), tiling.image_size, max_num_tiles)
            for part in request.content
        ]

    def _prompt(self, request: GenerationRequest, content: list[str | TiledImage]) -> Prompt:
        return build_prompt(
            [part if isinstance(part, str) else ImageSlot(part.num_tiles) for part in content],
            self.tokenizer,
            tokens_per_tile=self.engine.vision.vision.tokens_per_tile,
            vocab_size=self.engine.checkpoint_config.decoder.vocab_size,
            system=request.system,
            prompt_format=request.prompt_format,
        )

    def _encode(self, images: list[TiledImage]) -> torch.Tensor | None:
        """The prompt table [num_virtual_tokens, hidden_size]: all tiles' embeddings in order."""
        if not images:
            return None
        tiles = torch.cat([normalize(image.tiles) for image in images])
        return self.vision.encode(tiles).flatten(0, 1)

    def _take(self, output: StepOutput) -> TextDelta:
        answer = self._answers[output.request_id]
        if output.error is not None:
            self.cancel(output.request_id)
            error = UserError(f"the decoder gave the request up: {output.error}")
            return TextDelta(output.request_id, "", None, error)
        if answer.first_token is None:
            answer.first_token = time.perf_counter()
        text = ""
        if output.token_id is not None:
            answer.token_ids.append(output.token_id)
            text = answer.stream.push(output.token_id)
        reason: FinishReason | None = "stop" if answer.stream.stopped else output.finish_reason
        if reason is None:
            return TextDelta(output.request_id, text, None)
        text += answer.stream.finish()
        self.cancel(output.request_id)  # a stop string ends it before the decoder knows
        return TextDelta(output.request_id, text, _result(answer, reason))


def _result(answer: _Answer, reason: FinishReason) -> GenerationResult:
    now = time.perf_counter()
    first_token = answer.first_token or now
    decode_s = now - first_token
    num_tokens = len(answer.token_ids)
    return GenerationResult(
        text=answer.stream.text,
        token_ids=answer.token_ids,
        finish_reason=reason,
        num_prompt_tokens=answer.num_prompt_tokens,
        num_tokens=num_tokens,
        num_tiles=answer.num_tiles,
        grids=answer.grids,
        boxes=parse_boxes(answer.stream.text),
        timings=Timings(
            tiling_ms=1e3 * (answer.tiled - answer.started),
            vision_ms=1e3 * (answer.encoded - answer.tiled),
            prefill_ms=1e3 * (first_token - answer.encoded),
            decode_ms=1e3 * decode_s,
            total_ms=1e3 * (now - answer.started),
            decode_tokens_per_s=(num_tokens - 1) / decode_s if num_tokens > 1 else 0.0,
        ),
    )
