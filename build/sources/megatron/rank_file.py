"""One rank's model_optim_rng.pt, memory-mapped; nothing that it names is imported or run.

torch's own restricted unpickler reads it (`weights_only`): tensors, OrderedDict, plain values and
what is allowed here. Classes that training state is made of become placeholders without content.
"""

from __future__ import annotations

import argparse
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from nvlm.program.errors import UserError, cut, shown

_NAMESPACE = "argparse.Namespace"
_INERT_PACKAGES = ("megatron.", "transformer_engine.")
_INERT = {
    "_io.BytesIO",  # Transformer Engine's _extra_state
    "numpy.core.multiarray._reconstruct",  # state of the random number generators, numpy < 2
    "numpy._core.multiarray._reconstruct",  # the same, numpy 2
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.ndarray",
    "numpy.dtype",
    "signal.Signals",  # args.exit_signal
}
_PLAIN = (bool, int, float, str, type(None))


class _Placeholder:
    """Stands for any object that is not needed, whatever it is made from."""

    __slots__ = ()

    def __new__(cls, *_: object) -> _Placeholder:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


@dataclass(frozen=True, slots=True)
class RankFile:
    """What one rank's file holds."""

    path: Path  # of the file
    args: dict[str, Any]  # Megatron's arguments that are plain values
    iteration: int | None  # of training; None: the file does not say
    tensors: dict[str, torch.Tensor]  # of the model, mapped

    @classmethod
    def read(cls, path: Path) -> RankFile:
        """Memory: the pickle and the tensors' headers; their data stays in the file.

        Raises `UserError` for a file that is damaged, hostile or not Megatron's.
        """
        values = _load(path)
        args = values.get("args") if isinstance(values, dict) else None
        if not isinstance(values, dict) or not isinstance(args, argparse.Namespace):
            raise UserError(
                f"{path} holds no Megatron arguments, expected a dictionary with 'args' and "
                "'model' as Megatron-Core saves it; give such a checkpoint, or copy it again"
            )
        if "model0" in values:
            raise UserError(
                f"{path} was saved with virtual pipeline stages, expected one 'model' in it; save "
                "it again without --num-layers-per-virtual-pipeline-stage"
            )
        if values.get("checkpoint_version") != 3.0:
            raise UserError(
                f"{path} has checkpoint_version {shown(values.get('checkpoint_version'))}, "
                "expected 3.0 (older ones order q, k and v in other ways); save it with "
                "Megatron-Core"
            )
        iteration, model = values.get("iteration"), values.get("model")
        if not isinstance(model, dict) or not all(isinstance(name, str) for name in model):
            raise UserError(f"{path} holds no 'model' with named tensors; copy it again")
        return cls(
            path,
            {key: value for key, value in vars(args).items() if isinstance(value, _PLAIN)},
            iteration if isinstance(iteration, int) else None,
            {
                name: _dense(path, name, value)
                for name, value in model.items()
                if not name.endswith("_extra_state")  # FP8 training's
            },
        )


def _load(path: Path) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:
            # Mapped, a compressed record would be read as if its bytes were the tensor's.
            stored = all(r.compress_type == zipfile.ZIP_STORED for r in archive.infolist())
        names = set(get_unsafe_globals_in_checkpoint(str(path)))
    except Exception as error:  # zip and pickle readers raise whatever the bytes lead them to
        raise _damaged(path, error) from None
    if not stored:
        raise UserError(f"{path} is compressed, expected what torch.save wrote; save it again")
    refused = sorted(shown(n) for n in names if n != _NAMESPACE and not _is_inert(n))
    if refused:
        raise UserError(
            f"{path} asks for {', '.join(refused[:3])}, which is refused: only tensors, plain "
            "values and Megatron's own classes are read; save it with 'args' and 'model' alone"
        )
    allowed: list[Any] = [(_Placeholder, name) for name in names - {_NAMESPACE}]
    try:
        with safe_globals([*allowed, (argparse.Namespace, _NAMESPACE)]):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:  # torch's own words advise to switch the protection off
        raise UserError(
            f"{path} is refused: its pickle does more than name tensors and plain values, expected "
            "what Megatron-Core saves; copy or save the checkpoint again"
        ) from None
    except Exception as error:
        raise _damaged(path, error) from None


def _is_inert(name: str) -> bool:
    return name.startswith(_INERT_PACKAGES) or name in _INERT


def _damaged(path: Path, error: Exception) -> UserError:
    reason = cut(str(error).strip().partition("\n")[0]) or "it ends too early"
    return UserError(
        f"{path} cannot be read ({reason}), expected a whole file in the zip format of "
        "torch.save; copy or save the checkpoint again"
    )


def _dense(path: Path, name: str, value: object) -> torch.Tensor:
    if (
        not isinstance(value, torch.Tensor)
        or value.layout != torch.strided
        or value.device.type != "cpu"
        or value.dtype not in (torch.float32, torch.float16, torch.bfloat16)
    ):
        found = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
        raise UserError(
            f"{path}: {name} is stored as {found}, expected a tensor of float32, float16 or "
            "bfloat16; save the checkpoint without FP8 parameters"
        )
    return value.detach()
