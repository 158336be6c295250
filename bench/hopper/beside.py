"""Pictures are encoded while requests decode, in several ways: what each costs the decode steps.

    python -m bench.hopper.beside WAY [--shape 72b] [--layers 80] [--batch_size 8] [--context 2048]
        [--tiles 7] [--precision FP8] [--rate 1.0] [--seconds 10] [--num_sms 32]
        [--slice_ms 10]

WAY, one a process, since graphs keep what they were captured with:
    whole     all tiles of a picture in one pass, on the decoder's stream
    tiles     one tile after the other on that stream, with a step between two
    slices    all tiles in slices of --slice_ms on that stream, as servers encode (decision 147)
    stream    all tiles in one pass, on a stream of their own
    priority  the same, while the decoder's stream has the highest priority
    green     the same, on a green context of --num_sms multiprocessors
Times are of the host's clock. Steps count as "beside" while a picture is being encoded. On a CPU
`whole` and `tiles` run. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.hopper.decoder import random_prompt
from bench.hopper.device import device_for
from bench.hopper.parts import OneDevice
from bench.hopper.vision import random_tiles
from bench.machine import describe, describe_gpu
from bench.rows import gap_percentiles
from bench.synthetic_engine import DECODERS, synthetic_engine
from nvlm.program.process import set_up_log
from runtime.decoder.executor import DecoderRequest
from runtime.decoder.torch_executor import TorchDecoderExecutor
from runtime.vision.executor import VisionExecutor

WAYS = ("whole", "tiles", "slices", "stream", "priority", "green")
_HIGHEST_PRIORITY = -5  # CUDA takes the nearest that it has


@dataclass(frozen=True, slots=True)
class Streams:
    """Streams of decoder and vision; None is the default one."""

    decoder: torch.cuda.Stream | None = None
    vision: torch.cuda.Stream | None = None

    @classmethod
    def of(cls, way: str, num_sms: int) -> Streams:
        if way == "stream":
            return cls(vision=torch.cuda.Stream())
        if way == "priority":
            return cls(torch.cuda.Stream(priority=_HIGHEST_PRIORITY), torch.cuda.Stream())
        if way == "green":
            return cls(vision=_green_stream(num_sms))
        return cls()


def _green_stream(num_sms: int) -> torch.cuda.Stream:
    """A stream of a green context, whose kernels use at least `num_sms` multiprocessors.

    The calls are those of the CUDA driver, section Green Contexts; the context is never closed.
    """
    from cuda.bindings import driver

    def checked(answer: tuple[Any, ...]) -> Any:
        error, *values = answer
        assert error == driver.CUresult.CUDA_SUCCESS, f"CUDA answers {error}"
        return values[0]

    torch.cuda.current_stream().synchronize()  # the device's own context exists then
    device = checked(driver.cuDeviceGet(torch.cuda.current_device()))
    sms = driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
    every = checked(driver.cuDeviceGetDevResource(device, sms))
    (part,) = checked(driver.cuDevSmResourceSplitByCount(1, every, 0, num_sms))
    description = checked(driver.cuDevResourceGenerateDesc([part], 1))
    flags = driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
    context = checked(driver.cuGreenCtxCreate(description, device, flags))
    non_blocking = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
    stream = checked(driver.cuGreenCtxStreamCreate(context, non_blocking, 0))
    return torch.cuda.ExternalStream(int(stream))


@contextmanager
def on(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Work and graph captures of the calling thread are the stream's."""
    if stream is None:
        yield
        return
    graph: Any = torch.cuda.graph
    before, graph.default_capture_stream = graph.default_capture_stream, stream
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        graph.default_capture_stream = before


@dataclass(slots=True)
class Encoder:
    """Encodes a picture every `1 / rate` seconds from a thread of its own."""

    vision: VisionExecutor
    tiles: torch.Tensor
    at_once: int  # tiles of a pass
    stream: torch.cuda.Stream | None
    rate: float
    seconds: list[float] = field(default_factory=list)
    is_encoding: bool = False
    num_begun: int = 0
    _is_over: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Encoder:
        self._thread = threading.Thread(target=self._loop)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        assert self._thread is not None, "it was started"
        self._thread.join()

    def encode(self) -> None:
        with on(self.stream):
            for part in self.tiles.split(self.at_once):
                table = self.vision.encode(part)
                if table.is_cuda:
                    torch.cuda.current_stream().synchronize()

    def _loop(self) -> None:
        while not self._is_over.wait(0.5 / self.rate):
            self.is_encoding = True
            self.num_begun += 1
            start = time.perf_counter()
            self.encode()
            self.seconds.append(time.perf_counter() - start)
            self.is_encoding = False
            self._is_over.wait(0.5 / self.rate)


def steps_of(
    decoder: TorchDecoderExecutor, encoder: Encoder, seconds: float
) -> tuple[list[float], list[float]]:
    """Milliseconds of each decode step while nothing is encoded, and while something is."""
    quiet, beside = list[float](), list[float]()
    end = time.perf_counter() + seconds
    before = time.perf_counter()
    while before < end:
        was_encoding, num_begun = encoder.is_encoding, encoder.num_begun
        decoder.step()
        after = time.perf_counter()
        is_beside = was_encoding or encoder.num_begun > num_begun
        (beside if is_beside else quiet).append(1e3 * (after - before))
        before = after
    return quiet, beside


def measure(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    streams = Streams.of(options.way, options.num_sms)
    engine = synthetic_engine(
        options.shape,
        options.layers,
        max_batch_size=options.batch_size,
        max_seq_len=2 * options.context + 64,
    )
    slice_ms = options.slice_ms if options.way == "slices" else 0.0
    parts = OneDevice(device, use_graphs=device.type == "cuda")
    with on(streams.vision):
        vision = parts.vision(engine, options.precision, slice_ms)
    tiles = random_tiles(engine.vision_config, options.tiles, seed=0)
    at_once = 1 if options.way == "tiles" else options.tiles
    encoder = Encoder(vision, tiles, at_once, streams.vision, options.rate)
    with on(streams.decoder), torch.inference_mode():
        decoder = parts.decoder(engine)
        vocab_size = engine.checkpoint_config.decoder.vocab_size
        for seed in range(options.batch_size):
            prompt = random_prompt(vocab_size, options.context, seed)
            decoder.submit(DecoderRequest(prompt, options.context))
        while len(decoder.step()) < options.batch_size:
            pass
        for _ in range(3):
            encoder.encode()
        alone = time.perf_counter()
        encoder.encode()
        alone = time.perf_counter() - alone
        with encoder:
            quiet, beside = steps_of(decoder, encoder, options.seconds)
    assert beside, "no picture was encoded; give more --seconds"
    return {
        "way": options.way,
        "layers": options.layers,
        "batch_size": options.batch_size,
        "tiles": options.tiles,
        "num_sms": options.num_sms if options.way == "green" else None,
        "slice_ms": slice_ms or None,
        "encode_alone_ms": 1e3 * alone,
        "encode_ms": gap_percentiles([1e3 * each for each in encoder.seconds]),
        "num_pictures": len(encoder.seconds),
        "quiet_step_ms": gap_percentiles(quiet) if quiet else None,
        "beside_step_ms": gap_percentiles(beside),
        "num_steps_beside": len(beside),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("way", choices=WAYS)
    add("--shape", choices=DECODERS, default="72b")
    add("--layers", type=int, default=80)
    add("--batch_size", type=int, default=8)
    add("--context", type=int, default=2048)
    add("--tiles", type=int, default=7)
    add("--precision", default="FP8", help="of vision")
    add("--rate", type=float, default=1.0, help="pictures a second")
    add("--seconds", type=float, default=10.0)
    add("--num_sms", type=int, default=32, help="multiprocessors of the way green")
    add("--slice_ms", type=float, default=10.0, help="milliseconds of a slice of the way slices")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() and options.way not in ("whole", "tiles"):
        parser.error(f"{options.way} needs a GPU; whole and tiles run on a CPU")
    device = device_for(options.shape, parser)
    row = measure(options, device)
    for name in ("quiet_step_ms", "beside_step_ms", "encode_ms"):
        if row[name] is not None:
            print(f"{name:<15}" + ", ".join(f"{key} {ms:.1f}" for key, ms in row[name].items()))
    json.dump({"machine": describe() | describe_gpu(device), "beside": row}, sys.stdout)
    print()


if __name__ == "__main__":
    set_up_log(0)  # how vision was cut
    main()
