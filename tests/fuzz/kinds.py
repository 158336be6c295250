"""All kinds of input that are tried."""

from __future__ import annotations

from tests.fuzz.artefacts import open_configs, open_reports, open_safetensors, open_tokenizer
from tests.fuzz.benchmark_files import open_run_records, open_truth_files
from tests.fuzz.kind import Kind
from tests.fuzz.pictures import open_pictures
from tests.fuzz.questions import open_bodies, open_request_lines, open_tensors
from tests.fuzz.videos import open_videos

KINDS = {
    kind.name: kind
    for kind in (
        Kind("pictures", open_pictures),
        Kind("videos", open_videos),
        Kind("safetensors", open_safetensors),
        Kind("configs", open_configs),
        Kind("tokenizer", open_tokenizer),
        Kind("reports", open_reports),
        Kind("run_records", open_run_records),
        Kind("truth_files", open_truth_files),
        Kind("request_lines", open_request_lines),
        Kind("http_bodies", open_bodies),
        Kind("triton_tensors", open_tensors),
    )
}
