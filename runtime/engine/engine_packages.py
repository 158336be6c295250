"""An engine runs with the packages it was built with and on such a GPU, or not at all."""

from __future__ import annotations

from collections.abc import Callable

import torch

from nvlm.planning.targets import compute_capability
from nvlm.planning.tensorrt_llm_package import load_tensorrt_llm
from nvlm.planning.tensorrt_package import load_tensorrt
from nvlm.program.errors import UserError
from runtime.engine.engine_dir import EngineDir

_VERSIONS: dict[str, Callable[[], str]] = {
    "tensorrt": lambda: str(load_tensorrt("tensorrt").__version__),
    "tensorrt_rtx": lambda: str(load_tensorrt("tensorrt_rtx").__version__),
    "tensorrt_llm": lambda: str(load_tensorrt_llm().__version__),
}


def require_packages(engine: EngineDir, device: torch.device) -> None:
    """Raises `UserError` for another version, another kind of GPU, or none."""
    packages = engine.packages
    if not packages:
        return
    targets = f"{engine.decoder_target} and {engine.vision_executor}"
    if device.type != "cuda":
        raise UserError(
            f"{engine.directory} was built for {targets}, which need its GPU, but it is to run on "
            f"{device}; use --device cuda or build it with --decoder torch --vision torch"
        )
    rebuild = f"build it again with build_engine.py --engine_dir {engine.directory} --overwrite"
    for name, version in packages.items():
        if name in _VERSIONS and (found := _VERSIONS[name]()) != version:
            raise UserError(
                f"{engine.directory} was built with {name} {version} but {found} is installed, "
                f"and engines run with no other version; install {name}=={version} or {rebuild}"
            )
    capability = compute_capability(device)
    if capability != packages["compute_capability"]:
        raise UserError(
            f"{engine.directory} was built for a GPU of compute capability "
            f"{packages['compute_capability']} but {device} has {capability}; {rebuild}"
        )
