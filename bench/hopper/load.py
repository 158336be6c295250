"""How fast an engine's weights come from disk to the device, beside the disk itself.

    python -m bench.hopper.load --folder D [--shape 72b] [--layers 16]

Writes random weights in the engine's format (72B width: 0.88 GB a layer, and 5 GB), drops them
from the page cache, reads the file plainly with four threads, drops it again, and loads it by the
product's loader. `ready_s` adds what a start needs beside weights: compiling, CUDA graphs, a first
prompt. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.machine import describe, describe_gpu
from bench.stopwatch import seconds_of
from bench.synthetic_engine import DECODERS, decoder_source, synthetic_engine
from build.output.safetensors_writer import SafetensorsWriter
from nvlm.formats import layout
from nvlm.formats.checkpoint_tensors import decoder_tensors
from nvlm.program.process import set_up_cublas
from runtime.decoder.models.hopper_weights import load_hopper_weights
from runtime.decoder.models.open_model import open_model
from runtime.decoder.models.read_ahead import reading_ahead
from runtime.decoder.models.torch_weights import open_weights
from runtime.engine.engine_dir import EngineDir

_CHUNK_BYTES = 8 << 20


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


def read_plainly(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)

    def read(offset: int) -> int:
        return len(os.pread(fd, _CHUNK_BYTES, offset))

    with ThreadPoolExecutor(4) as pool:
        size = sum(pool.map(read, range(0, path.stat().st_size, _CHUNK_BYTES)))
    os.close(fd)
    assert size == path.stat().st_size


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--shape", choices=DECODERS, default="72b")
    parser.add_argument("--layers", type=int, default=16)
    options = parser.parse_args(arguments)
    set_up_cublas(os.environ)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    engine = synthetic_engine(options.shape, options.layers, max_batch_size=8, max_seq_len=4096)
    engine = replace(engine, directory=options.folder)
    path, config = write_weights(engine, device), engine.checkpoint_config
    size = path.stat().st_size
    print(f"{size / 1e9:.2f} GB are written", flush=True)

    def load() -> None:
        with reading_ahead(path):
            load_hopper_weights(open_weights(path.parent, config), config, device)

    found: dict[str, Any] = {"machine": describe() | describe_gpu(device), "bytes": size}
    for name, work in (
        ("disk", lambda: read_plainly(path)),
        ("load", load),
        ("disk again", lambda: read_plainly(path)),
    ):
        forget(path)
        found[f"{name}_s"] = seconds_of(work, device)
        print(f"{name:<12}{size / found[f'{name}_s'] / 1e9:8.2f} GB/s", flush=True)
    found["load from page cache_s"] = seconds_of(load, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    found["ready_s"] = seconds_of(lambda: open_model(engine, device), device)
    found["share_of_disk"] = min(found["disk_s"], found["disk again_s"]) / found["load_s"]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
