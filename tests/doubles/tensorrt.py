"""TensorRT 10.14 where only TensorRT-RTX can be had.

Building is TensorRT-RTX's own work: real parser, real types, real compiler, so every call is
checked by the real bindings. What differs in TensorRT 10 is checked here (a strongly typed network
is asked for by a flag; the GPU is the machine's). The engine it gives holds the ONNX graph, which
ONNX Runtime runs; its runtime classes take the arguments that TensorRT-RTX's docstrings state.
"""

from __future__ import annotations

import re
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import torch

from nvlm.program.onnxruntime_package import onnxruntime
from tests.doubles.cuda import STREAM, CudaDouble

VERSION = "10.14.1.48"
_MAGIC = b"engine of the double\n"
_PROFILE = re.compile(rb"(\d+) (\d+) (\d+)\n")


def make_tensorrt(rtx: Any, gpu: CudaDouble) -> ModuleType:
    """A module called `tensorrt`; `rtx` is tensorrt_rtx."""
    module = ModuleType("tensorrt")
    for name in dir(rtx):
        if not name.startswith("_") and name != "ComputeCapability":
            setattr(module, name, getattr(rtx, name))

    class Builder:
        def __init__(self, logger: Any) -> None:
            self._real = rtx.Builder(logger)

        def create_network(self, flags: int = 0) -> Any:
            typed = 1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
            assert flags & typed, "TensorRT 10 types a network strongly only when asked"
            return self._real.create_network(flags)

        def create_builder_config(self) -> Any:
            return self._real.create_builder_config()

        def create_optimization_profile(self) -> Any:
            self._profile = self._real.create_optimization_profile()
            return self._profile

        def build_serialized_network(self, network: Any, config: Any) -> Any:
            config.num_compute_capabilities = 1
            config.set_compute_capability(rtx.ComputeCapability.SM89, 0)
            plan = self._real.build_serialized_network(network, config)
            assert plan is not None
            tiles = self._profile.get_shape(network.get_input(0).name)
            ranges = " ".join(str(shape[0]) for shape in tiles)
            return Plan(_MAGIC + ranges.encode() + b"\n" + Parser.models[-1])

    class Plan(bytes):
        @property
        def nbytes(self) -> int:
            return len(self)

    class Parser(rtx.OnnxParser):  # type: ignore[misc]
        models: list[bytes] = []  # noqa: RUF012

        def parse_from_file(self, model: str) -> bool:
            Parser.models.append(onnx.load(model).SerializeToString())
            parsed: bool = super().parse_from_file(model)
            return parsed

    class Runtime:
        def __init__(self, logger: Any) -> None:
            assert isinstance(logger, rtx.ILogger)
            self._logger = logger

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
            if not serialized_engine.startswith(_MAGIC):
                self._logger.log(rtx.ILogger.Severity.ERROR, "Serialization assertion magicTag")
                return None
            return Engine(rtx, gpu, bytes(serialized_engine))

    module.Builder, module.OnnxParser, module.Runtime = (  # type: ignore[attr-defined]
        Builder,
        Parser,
        Runtime,
    )
    module.__version__ = VERSION  # type: ignore[attr-defined]
    return module


class Engine:
    def __init__(self, rtx: Any, gpu: CudaDouble, plan: bytes) -> None:
        self.rtx, self.gpu = rtx, gpu
        match = _PROFILE.match(plan, len(_MAGIC))
        assert match is not None
        self.range = tuple(map(int, match.groups()))
        self.model = onnx.load_from_string(plan[match.end() :])
        graph = self.model.graph
        self._tensors = {t.name: t for t in (*graph.input, *graph.output)}
        self._inputs = {t.name for t in graph.input}

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_dtype(self, name: str) -> Any:
        types = {1: "FLOAT", 10: "HALF", 16: "BF16"}
        return getattr(self.rtx.DataType, types[self._tensors[name].type.tensor_type.elem_type])

    def shape(self, name: str, num_tiles: int) -> tuple[int, ...]:
        dims = self._tensors[name].type.tensor_type.shape.dim
        return (num_tiles, *(dim.dim_value for dim in dims[1:]))

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        assert name in self._inputs, "profiles are of inputs"
        assert profile_index == 0, "one profile was built"
        return [self.shape(name, num_tiles) for num_tiles in self.range]

    def create_execution_context(self) -> ExecutionContext:
        return ExecutionContext(self)

    def create_engine_inspector(self) -> Inspector:
        return Inspector()


class Inspector:
    def get_engine_information(self, format: Any) -> str:  # noqa: A002
        return '{"Layers": [{"LayerType": "gemm", "Outputs": [{"Format/Datatype": "Half"}]}]}'


class ExecutionContext:
    """Complains about calls in a wrong order, unknown names and memory that is not the GPU's."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._num_tiles = 0
        self._addresses: dict[str, int] = {}
        self._session = onnxruntime.InferenceSession(engine.model.SerializeToString())

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        smallest, _, largest = self._engine.range
        self._addresses.clear()
        self._num_tiles = shape[0]
        return smallest <= shape[0] <= largest and shape == self._engine.shape(name, shape[0])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        assert self._num_tiles, "the shape of an output is known once the input's is set"
        return self._engine.shape(name, self._num_tiles)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert name in self._engine._tensors, f"no tensor is called {name}"
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert stream_handle == STREAM, "another stream than torch's would need synchronising"
        names = list(self._engine._tensors)
        assert set(self._addresses) == set(names), "a tensor has no address"
        memory = {
            name: self._engine.gpu.memory(
                self._addresses[name],
                _TORCH[self._engine.get_tensor_dtype(name).name],
                self.get_tensor_shape(name),
            )
            for name in names
        }
        source, target = names
        (found,) = self._session.run([target], {source: np.array(memory[source])})
        memory[target].copy_(torch.from_numpy(found))
        self._engine.gpu.is_busy = True
        return True


_TORCH = {"FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16}
