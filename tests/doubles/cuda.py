"""A GPU for torch that is not there: tensors say they are on it and refuse to mix with a CPU's.

Inside `CudaDouble()` everything that asks for device "cuda" gets a tensor of ordinary memory that
calls itself CUDA. Reading one as numpy, or adding one to a CPU tensor, fails as on a real GPU.
"""

from __future__ import annotations

import ctypes
import threading
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode, _pop_mode_temporarily

from nvlm.planning import hopper

CUDA = torch.device("cuda", 0)
STREAM = 0x5EED
_GETTERS = {
    torch.Tensor.device.__get__: lambda tensor: CUDA,  # type: ignore[attr-defined]
    torch.Tensor.is_cuda.__get__: lambda tensor: True,  # type: ignore[attr-defined]
}


class CudaTensor(torch.Tensor):
    """Ordinary memory that calls itself CUDA."""


def plain(value: Any) -> Any:
    if isinstance(value, CudaTensor):
        return value.as_subclass(torch.Tensor)
    if isinstance(value, (list, tuple)):
        return type(value)(map(plain, value))
    return value


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


class CudaDouble(TorchFunctionMode):
    """`num_gpus` Hopper GPUs of `memory_bytes`."""

    def __init__(self, num_gpus: int = 8, memory_bytes: int = 80 << 30) -> None:
        super().__init__()
        self.capability = (9, 0)
        self.allocated: dict[int, int] = {}  # address -> bytes of what called itself CUDA
        self.is_busy = False  # what was launched on torch's stream may not be done

        def properties(device: Any = None) -> SimpleNamespace:
            name = "NVIDIA H100 80GB HBM3"
            return SimpleNamespace(total_memory=memory_bytes, name=name, uuid=f"GPU-{device}")

        self._patches = [
            patch.object(torch.cuda, "is_available", lambda: True),
            patch.object(torch.cuda, "device_count", lambda: num_gpus),
            patch.object(torch.cuda, "current_device", lambda: 0),
            patch.object(torch.cuda, "get_device_capability", lambda device=None: self.capability),
            patch.object(torch.cuda, "get_device_properties", properties),
            patch.object(
                torch.cuda, "mem_get_info", lambda device=None: (memory_bytes, memory_bytes)
            ),
            patch.object(hopper, "has_kernels", lambda device: False),  # a double runs none
            patch.object(torch.cuda, "device", lambda device: nullcontext()),
            patch.object(
                torch.cuda,
                "current_stream",
                lambda device=None: SimpleNamespace(
                    cuda_stream=STREAM, synchronize=self._synchronize
                ),
            ),
        ]

        # Tracing asks whether there is a GPU and then prepares for a real one.
        self._patches.append(patch.object(torch.onnx, "export", self._without(torch.onnx.export)))
        # A mode is a thread's own, a GPU the process's.
        self._patches.append(
            patch.object(threading.Thread, "run", self._within(threading.Thread.run))
        )

    def _synchronize(self) -> None:
        self.is_busy = False

    def _without(self, function: Any) -> Any:
        """`function`, called where the double is not."""

        def called(*args: Any, **named: Any) -> Any:
            with (
                _pop_mode_temporarily(),
                patch.object(torch.cuda, "is_available", lambda: False),
                patch.object(torch.cuda, "device_count", lambda: 0),
            ):
                return function(*args, **named)

        return called

    def _within(self, function: Any) -> Any:
        """`function`, called where the double is, on whatever thread."""

        def called(*args: Any, **named: Any) -> Any:
            TorchFunctionMode.__enter__(self)
            try:
                return function(*args, **named)
            finally:
                TorchFunctionMode.__exit__(self, None, None, None)

        return called

    def __enter__(self) -> CudaDouble:
        for item in self._patches:
            item.start()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for item in self._patches:
            item.stop()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        named.pop("pin_memory", None)  # without CUDA torch has none to give
        tensors = _tensors([*args, *named.values()])
        on_cuda = [tensor for tensor in tensors if isinstance(tensor, CudaTensor)]
        if on_cuda and func in _GETTERS:
            return _GETTERS[func](args[0])
        if on_cuda and func is torch.Tensor.numpy:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if on_cuda and func in (torch.Tensor.cpu, torch.Tensor.tolist, torch.Tensor.item):
            return func(*plain(args), **named)
        if on_cuda and func is torch.Tensor.copy_ and not isinstance(args[0], CudaTensor):
            return func(*plain(args), **named)  # from the GPU into host memory
        target = _device(args[1:], named) if func is torch.Tensor.to else _device((), named)
        if func is torch.Tensor.to and target is not None and (on_cuda or target.type == "cuda"):
            dtypes = [a for a in (*args[1:], named.get("dtype")) if isinstance(a, torch.dtype)]
            moved = plain(args[0])
            moved = moved.to(*dtypes) if dtypes else moved
            return self._wrap(moved) if target.type == "cuda" else moved.to(target)
        if target is not None and target.type == "cuda":
            named.pop("device")
            return self._wrap(func(*plain(args), **named))
        if on_cuda:
            others = [t for t in tensors if not isinstance(t, CudaTensor) and t.ndim]
            if others:
                raise RuntimeError("Expected all tensors to be on the same device: cuda:0 and cpu")
            return self._wrap(func(*plain(args), **{k: plain(v) for k, v in named.items()}))
        return func(*args, **named)

    def _wrap(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            self.allocated[value.data_ptr()] = value.numel() * value.itemsize
            return value.as_subclass(CudaTensor)
        if isinstance(value, (list, tuple)):
            return type(value)(map(self._wrap, value))
        return value

    def memory(self, address: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """What lies at an address of the GPU, as a kernel would see it: shared, not copied."""
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        assert address in self.allocated, f"{address:#x} is not memory of the GPU"
        assert num_bytes <= self.allocated[address], "a kernel would run past the allocation"
        buffer = (ctypes.c_byte * num_bytes).from_address(address)
        return torch.frombuffer(buffer, dtype=dtype).view(shape)


def _is_device(value: Any) -> bool:
    return isinstance(value, (torch.device, str))


def _device(args: tuple[Any, ...], named: dict[str, Any]) -> torch.device | None:
    found = [value for value in (*args, named.get("device")) if _is_device(value)]
    return torch.device(found[0]) if found else None
