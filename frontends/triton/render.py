"""From an engine directory to a model repository that Triton serves.

One set of templates, two forms: `torch` runs vision and decoder in the process of `nvlm`;
`tensorrt_llm` has them in the models `vision` and `tensorrt_llm` (the C++ backend).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from string import Template
from typing import Literal

from frontends.triton.ascii_paths import in_ascii
from frontends.triton.signature import (
    ENSEMBLE_INPUTS,
    ENSEMBLE_OUTPUTS,
    NVLM_INPUTS,
    NVLM_OUTPUTS,
    identity_map,
    to_pbtxt,
)
from nvlm.formats import layout
from runtime.decoder.tensorrt_llm_dialect import XgrammarTokenizer
from runtime.engine.engine_dir import EngineDir

Form = Literal["torch", "tensorrt_llm"]

PROJECT_DIR = Path(__file__).resolve().parents[2]
_TEMPLATES = Path(__file__).parent / "templates"

# Model -> the module that holds its code, if it is Python's.
_MODELS: dict[Form, dict[str, str | None]] = {
    "torch": {"nvlm": "frontends.triton.models.nvlm", "ensemble": None},
    "tensorrt_llm": {
        "nvlm": "frontends.triton.models.nvlm",
        "ensemble": None,
        "vision": "frontends.triton.models.vision",
        "tensorrt_llm": None,
    },
}
PYTHON_MODELS = ("nvlm", "vision")
_TRITON_DTYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "bfloat16": "TYPE_BF16"}


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What the model repository is rendered for."""

    form: Form  # which models it has
    device: str = "auto"  # where decoder and vision run
    num_threads: int = 0  # of each model's torch; 0: torch's own choice
    max_queue_size: int = 64  # requests that may wait
    # False: a model answers once and cannot stream, as clients of TensorRT-LLM's `decoupled_mode:
    # False` expect.
    decoupled: bool = True
    # Where the server will listen, by which `nvlm` asks the other models.
    grpc_url: str = "127.0.0.1:8001"
    hang_after_s: float = 0.0  # a thread of `nvlm` without progress hangs; 0: the plan's limit
    max_step_ms: float | None = None  # as in `DecoderOptions`
    # What the models' processes write into, by model.
    pipes: Mapping[str, Path] = field(default_factory=dict)


def processes_of(form: Form) -> list[str]:
    """The models that have a process of their own."""
    return [model for model, module in _MODELS[form].items() if module]


def form_of(engine: EngineDir) -> Form:
    return "tensorrt_llm" if engine.decoder_target == "tensorrt_llm" else "torch"


def render(engine: EngineDir, repository: Path, options: ServeOptions) -> None:
    """Writes the repository's folders into the directory `repository`, which exists."""
    versions = {model: repository / model / "1" for model in _MODELS[options.form]}
    for version in versions.values():
        version.mkdir(parents=True)  # Triton wants it even where it holds nothing
    values = _values(engine, repository, options, versions["nvlm"])
    for model, module in _MODELS[options.form].items():
        template = Template((_TEMPLATES / model / "config.pbtxt").read_text(encoding="utf-8"))
        config = repository / model / "config.pbtxt"
        config.write_text(template.substitute(values), encoding="utf-8")
        if module:
            code = Template((_TEMPLATES / "model.py.txt").read_text(encoding="utf-8"))
            project_dir = repr(str(in_ascii(PROJECT_DIR, versions[model] / "project")))
            (versions[model] / "model.py").write_text(
                code.substitute(project_dir=project_dir, module=module), encoding="utf-8"
            )
    if options.form == "tensorrt_llm":
        tokenizer = XgrammarTokenizer.read(engine.directory / layout.TOKENIZER)
        _tokenizer_info(repository).write_text(json.dumps(asdict(tokenizer)), "utf-8")


def _tokenizer_info(repository: Path) -> Path:
    """What TensorRT-LLM's backend reads for guides."""
    return repository.resolve() / "tensorrt_llm" / "1" / "xgrammar_tokenizer_info.json"


def _values(
    engine: EngineDir, repository: Path, options: ServeOptions, version: Path
) -> dict[str, object]:
    config = engine.checkpoint_config
    directory = in_ascii(engine.directory.resolve(), version / "engine")
    return {
        "engine_dir": _quoted(directory),
        "llm_dir": _quoted(directory / layout.LLM),
        "tokenizer_info": _quoted(_tokenizer_info(repository)),
        "form": options.form,
        "device": options.device,
        "num_threads": options.num_threads,
        "max_queue_size": options.max_queue_size,
        # Beside the requests that `nvlm` has taken: as many, so that no burst is refused too early.
        "triton_queue_size": engine.limits.max_batch_size + options.max_queue_size,
        "grpc_url": options.grpc_url,
        "hang_after_s": options.hang_after_s,
        "max_step_ms": "auto" if options.max_step_ms is None else options.max_step_ms,
        **{f"pipe_{model}": _quoted(options.pipes.get(model, Path())) for model in PYTHON_MODELS},
        "decoupled": str(options.decoupled).lower(),
        "max_batch_size": engine.limits.max_batch_size,
        "image_size": engine.tiling.image_size,
        "tokens_per_tile": engine.vision_config.tokens_per_tile,
        "hidden_size": config.decoder.hidden_size,
        "table_data_type": _TRITON_DTYPES[config.dtype],
        "nvlm_inputs": to_pbtxt("input", NVLM_INPUTS),
        "nvlm_outputs": to_pbtxt("output", NVLM_OUTPUTS),
        "ensemble_inputs": to_pbtxt("input", ENSEMBLE_INPUTS),
        "ensemble_outputs": to_pbtxt("output", ENSEMBLE_OUTPUTS),
        "ensemble_input_map": identity_map("input_map", ENSEMBLE_INPUTS),
        "ensemble_output_map": identity_map("output_map", ENSEMBLE_OUTPUTS),
    }


def _quoted(path: Path) -> str:
    """A string of protobuf's text format."""
    return json.dumps(str(path), ensure_ascii=False)
