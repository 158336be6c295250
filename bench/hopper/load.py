"""How fast an engine's weights come to the device, and what a start needs beside that.

    python -m bench.hopper.load --folder D [--disk] [--shape 72b] [--layers 16]

Writes random weights in the engine's format (72B width: 0.88 GB a layer, and 5 GB). They are then
in the page cache; /dev/shm is one too. Loads them by the product's loader, beside plain reads into
memory and plain copies to the GPU, and by other numbers of threads. With --disk it drops them from
the page cache first, each time.

Then starts processes that open the decoder as a server does. The first compiles the kernels, which
are kept in the folder as an engine keeps them; of the others, one has an empty cache of Triton's.
`start without load` is the age of the process when it is ready, less what loading took.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from bench.hopper.device import device_for
from bench.machine import describe, describe_gpu
from bench.stopwatch import seconds_of
from bench.synthetic_engine import DECODERS, decoder_source, synthetic_engine
from build.output.safetensors_writer import SafetensorsWriter
from nvlm.formats import layout
from nvlm.formats.checkpoint_tensors import decoder_tensors
from nvlm.formats.safetensors_reader import SafetensorsReader
from nvlm.formats.tensor_copies import MAX_THREADS, PIECE_BYTES, FileCopies
from nvlm.planning import hopper
from nvlm.program import startup
from nvlm.program.process import set_up_cublas, set_up_log
from runtime.decoder.executor import DecoderOptions
from runtime.decoder.models.hopper_weights import load_hopper_weights
from runtime.decoder.models.torch_weights import open_weights
from runtime.decoder.torch_executor import TorchDecoderExecutor
from runtime.engine.engine_dir import EngineDir
from runtime.engine.kept_kernels import about_kernels, keep_kernels, kernel_cache
from runtime.engine.launchers import Types, recording
from runtime.engine.libraries import set_up_libraries

ROOT = Path(__file__).parents[2]
WAYS = ((1, 8), (4, 8), (8, 8), (8, 32), (16, 8))  # threads, MiB of a piece
_COPIES = 256


def engine_in(folder: Path, shape: str, num_layers: int) -> EngineDir:
    engine = synthetic_engine(shape, num_layers, max_batch_size=8, max_seq_len=4096)
    return replace(engine, directory=folder)


def write_weights(engine: EngineDir, device: torch.device) -> Path:
    path = engine.directory / layout.LLM / layout.rank_file(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = decoder_tensors(engine.checkpoint_config)
    if not path.exists():
        source = decoder_source(engine, device)
        with SafetensorsWriter(path, tensors) as writer:
            for name in tensors:
                writer.write(name, source.read(name))
    return path


def forget(path: Path) -> None:
    """What is read next comes from the disk."""
    fd = os.open(path, os.O_RDONLY)
    os.fdatasync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def read_plainly(path: Path, num_threads: int) -> None:
    """Into one piece of memory a thread, again and again."""
    fd, size = os.open(path, os.O_RDONLY), path.stat().st_size
    offsets = iter(range(0, size, PIECE_BYTES))
    lock, counts = threading.Lock(), [0] * num_threads

    def read(number: int) -> None:
        piece = bytearray(PIECE_BYTES)
        while True:
            with lock:
                offset = next(offsets, None)
            if offset is None:
                return
            counts[number] += os.preadv(fd, [piece], offset)

    threads = [threading.Thread(target=read, args=[number]) for number in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(fd)
    assert sum(counts) == size


def pinned_copies(device: torch.device) -> None:
    """From one piece of pinned memory, again and again."""
    is_gpu = device.type == "cuda"
    source = torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=is_gpu)
    target = torch.empty(PIECE_BYTES, dtype=torch.uint8, device=device)
    for _ in range(_COPIES):
        target.copy_(source, non_blocking=True)


def copy_all(path: Path, device: torch.device, num_threads: int, piece_mib: int) -> None:
    reader = SafetensorsReader(path)
    copies = FileCopies(reader, device, num_threads=num_threads, piece_bytes=piece_mib << 20)
    with copies:
        _kept = [copies.read(name) for name in reader.tensors]


def measure_load(
    engine: EngineDir, path: Path, device: torch.device, *, disk: bool
) -> dict[str, float]:
    """GB/s of each way, in the order in which they are taken."""
    config, size = engine.checkpoint_config, path.stat().st_size

    def load() -> None:
        load_hopper_weights(open_weights(path.parent, config), config, device)

    works: dict[str, Callable[[], object]] = {
        "read, 1 thread": partial(read_plainly, path, 1),
        f"read, {MAX_THREADS} threads": partial(read_plainly, path, MAX_THREADS),
        "load, the first": load,
        "load": load,
        "load again": load,
    }
    if disk:
        works = {f"read, {MAX_THREADS} threads": works[f"read, {MAX_THREADS} threads"]}
        works |= {"load": load, "read again": works[f"read, {MAX_THREADS} threads"]}
    else:
        works |= {
            f"{threads} threads, pieces of {mib} MiB": partial(copy_all, path, device, threads, mib)
            for threads, mib in WAYS
        }
    found: dict[str, float] = {}
    for name, work in works.items():
        if disk:
            forget(path)
        found[name] = size / seconds_of(work, device) / 1e9
        print(f"{name:<34}{found[name]:8.2f} GB/s", flush=True)
    pinned_copies(device)  # allocates
    seconds = seconds_of(lambda: pinned_copies(device), device)
    found["pinned copy"] = _COPIES * PIECE_BYTES / seconds / 1e9
    print(f"{'pinned copy':<34}{found['pinned copy']:8.2f} GB/s", flush=True)
    return found


def open_as_a_server(engine: EngineDir, device: torch.device, *, keeps: bool) -> None:
    """In a process of its own: prints its age, and its log what it spent. keeps: the kernels that
    it compiled, in the engine."""
    set_up_log(0)
    startup.show()
    startup.took("python and imports", startup.process_age_s())
    set_up_libraries(engine, device, os.environ)
    recorded: AbstractContextManager[list[Types]] = recording() if keeps else nullcontext([])
    with recorded as types:
        decoder = TorchDecoderExecutor.load(engine, device, DecoderOptions(max_step_ms=None))
    print(startup.process_age_s())
    decoder.close()
    if keeps:
        keep_kernels(kernel_cache(), engine.directory, about_kernels(device), types)


def start(cache: Path, flags: list[str]) -> dict[str, Any]:
    """What such a process says, with `cache` as Triton's."""
    words = [sys.executable, "-m", "bench.hopper.load", "--opens", *flags]
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run(
        words, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    spent = startup.spent(done.stderr)
    ready_s = float(done.stdout.split()[-1])
    load_s = spent.get("decoder weights", 0.0)
    return {"ready_s": ready_s, "without_load_s": ready_s - load_s, "spent_s": spent}


def measure_starts(
    engine: EngineDir, device: torch.device, flags: list[str]
) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    with TemporaryDirectory() as folder:
        cache, empty = Path(folder) / "cache", Path(folder) / "empty"
        cache.mkdir()
        keeping = ["--keeps"] if hopper.has_kernels(device) else []
        found["kernels compiled anew"] = start(cache, flags + keeping)
        found["kernels kept, Triton's cache empty"] = start(empty, flags)
        found["kernels in Triton's cache"] = start(empty, flags)
    for name, each in found.items():
        print(
            f"{name:<36} ready after {each['ready_s']:6.2f} s, "
            f"{each['without_load_s']:6.2f} without load"
        )
        for phase, seconds in each["spent_s"].items():
            print(f"    {phase:<32}{seconds:8.2f} s", flush=True)
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--shape", choices=DECODERS, default="72b")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--disk", action="store_true", help="drop the page cache, start nothing")
    parser.add_argument("--opens", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--keeps", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    set_up_cublas(os.environ)
    device = device_for(options.shape, parser)
    engine = engine_in(options.folder.resolve(), options.shape, options.layers)
    if options.opens:
        open_as_a_server(engine, device, keeps=options.keeps)
        return
    path = write_weights(engine, device)
    size = path.stat().st_size
    print(f"{size / 1e9:.2f} GB are written", flush=True)
    found: dict[str, Any] = {"machine": describe() | describe_gpu(device), "bytes": size}
    found["gb_per_s"] = measure_load(engine, path, device, disk=options.disk)
    if options.disk:
        rates = found["gb_per_s"]
        plain = max(rate for name, rate in rates.items() if name.startswith("read"))
        found["share_of_disk"] = rates["load"] / plain
    else:
        if device.type == "cuda":
            torch.cuda.empty_cache()
        flags = ["--folder", str(engine.directory), "--shape", options.shape]
        flags += ["--layers", str(options.layers)]
        found["starts"] = measure_starts(engine, device, flags)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
