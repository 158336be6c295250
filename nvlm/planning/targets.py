"""What each target of build_engine.py needs of a machine: one table for builder and doctor."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from nvlm.planning import tensorrt_llm_package, tensorrt_package

Decoder = Literal["torch", "tensorrt_llm"]
Vision = Literal["onnxruntime", "torch", "tensorrt", "tensorrt_rtx"]

HOPPER = "9.0"


@dataclass(frozen=True, slots=True)
class Machine:
    """Where an engine is to run."""

    # Compute capabilities of the GPUs that it may run on, as "9.0"; empty: a CPU.
    capabilities: tuple[str, ...] = ()
    is_cross: bool = False  # it is compiled for a GPU that need not be here

    @classmethod
    def of(cls, device: torch.device) -> Machine:
        if device.type != "cuda" or not torch.cuda.is_available():
            return cls()
        return cls((compute_capability(device),))

    @property
    def has_hopper(self) -> bool:
        return HOPPER in self.capabilities


@dataclass(frozen=True, slots=True)
class Missing:
    """What keeps a target from a machine, and what to do about it."""

    what: str  # as a phrase, such as "no package tensorrt"
    fix: str  # what the user does about it, as an imperative


def compute_capability(device: torch.device | int) -> str:
    return "{}.{}".format(*torch.cuda.get_device_capability(device))


def missing_for_decoder(target: Decoder, machine: Machine) -> list[Missing]:
    """Everything that keeps `target` from being built and run on `machine`."""
    return _missing(_DECODER_NEEDS[target], machine)


def missing_for_vision(target: Vision, machine: Machine) -> list[Missing]:
    return _missing(_VISION_NEEDS[target], machine)


def in_one_line(missing: list[Missing]) -> str:
    """All of them in one line."""
    return "; ".join(f"{each.what}: {each.fix}" for each in missing)


Need = Callable[[Machine], Missing | None]


def _missing(needs: tuple[Need, ...], machine: Machine) -> list[Missing]:
    return [found for need in needs if (found := need(machine)) is not None]


def _package(name: str, install: str) -> Need:
    def need(_: Machine) -> Missing | None:
        if importlib.util.find_spec(name) is not None:
            return None
        return Missing(f"{name} is not installed", install)

    return need


def _tensorrt_llm(_: Machine) -> Missing | None:
    if not tensorrt_llm_package.is_installed():
        return Missing("tensorrt_llm is not installed", tensorrt_llm_package.INSTALL)
    version = tensorrt_llm_package.installed_version()
    if version is None or tensorrt_llm_package.is_supported(version):
        return None
    expected = tensorrt_llm_package.SUPPORTED
    return Missing(
        f"tensorrt_llm {version} is installed, expected {expected}", tensorrt_llm_package.INSTALL
    )


def _gpu(machine: Machine) -> Missing | None:
    if machine.capabilities:
        return None
    return Missing(
        "torch sees or may use no GPU", "run on the one it is for, with a CUDA build of torch"
    )


def _hopper(machine: Machine) -> Missing | None:
    if machine.has_hopper or not machine.capabilities:  # `_gpu` reports no GPU
        return None
    found = ", ".join(machine.capabilities)
    return Missing(
        f"the GPU has compute capability {found}, its FP8 engines are for Hopper ({HOPPER})",
        "run on an H100, H200 or GH200",
    )


def _rtx_gpu(machine: Machine) -> Missing | None:
    if machine.is_cross or any(found != HOPPER for found in machine.capabilities):
        return None
    return Missing(
        "it runs on RTX GPUs only (Turing to Blackwell, not Hopper), and torch sees none",
        "build here for one of those with --compute_capability, and run there",
    )


_EXPORT = tuple(_package(name, f"pip install {name}") for name in ("onnx", "onnxscript"))
_ONNXRUNTIME = _package("onnxruntime", "pip install onnxruntime")
_TENSORRT, _TENSORRT_RTX = (
    _package(name, tensorrt_package.INSTALL[name]) for name in tensorrt_package.PACKAGES
)

_DECODER_NEEDS: dict[Decoder, tuple[Need, ...]] = {
    "torch": (),
    "tensorrt_llm": (_gpu, _hopper, _tensorrt_llm, _TENSORRT),
}
_VISION_NEEDS: dict[Vision, tuple[Need, ...]] = {
    "onnxruntime": (*_EXPORT, _ONNXRUNTIME),
    "torch": (),
    "tensorrt": (_gpu, _TENSORRT, *_EXPORT),
    "tensorrt_rtx": (_rtx_gpu, _TENSORRT_RTX, *_EXPORT),
}
assert _DECODER_NEEDS.keys() == set(get_args(Decoder))
assert _VISION_NEEDS.keys() == set(get_args(Vision))
