"""The model that clients call: runtime/serving's loop under Triton's Python backend."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import triton_python_backend_utils as pb_utils

from frontends.triton.models.delivery import Client, Delivery
from frontends.triton.models.heartbeat import Heartbeat
from frontends.triton.models.replies import CancelledError, error_response, log_end, send_last
from frontends.triton.parameters import refuse_unknown
from frontends.triton.request import read_request, wants_stream
from frontends.triton.signature import NVLM_INPUTS
from nvlm.program.command_line import resolve_device
from nvlm.program.errors import UserError
from nvlm.program.process import ignore_pillows_warnings, set_picture_types
from runtime.decoder.executor import DecoderOptions
from runtime.engine.engine_dir import EngineDir
from runtime.serving.loop import BusyError
from runtime.serving.picture_types import SERVER_PICTURE_TYPES
from runtime.serving.runner import Runner
from runtime.serving.server import Server

_POLL_S = 0.02  # how soon a place that came free is seen


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        parameters = {k: v["string_value"] for k, v in config["parameters"].items()}
        logging.basicConfig(stream=sys.stderr, format="%(asctime)s nvlm: %(message)s")
        logging.getLogger("frontends").setLevel(logging.INFO)
        ignore_pillows_warnings()
        set_picture_types(SERVER_PICTURE_TYPES)
        if num_threads := int(parameters["num_threads"]):
            torch.set_num_threads(num_threads)
        try:
            runner = _open(parameters)
        except UserError as error:
            raise pb_utils.TritonModelException(str(error)) from None
        self._is_decoupled = pb_utils.using_decoupled_model_transaction_policy(config)
        self._server = Server(
            runner,
            max_queue_size=int(parameters["max_queue_size"]),
            on_end=self._end,
            hang_after_s=float(parameters["hang_after_s"]) or None,
        )
        self._delivery = Delivery(self._server)
        self._server.watch(self._delivery.part)
        self._num_requests = 0
        self._heartbeat = Heartbeat(parameters["pipe"])

    def execute(self, requests: list[Any]) -> None:
        """Answers go out as they come, in both transaction policies. Returns at once unless the
        server is full: then requests wait in Triton's own queue, which refuses with 503."""
        for request in requests:
            self._accept(request)

    def finalize(self) -> None:
        self._heartbeat.leave()
        self._server.close()
        self._delivery.close()
        self._server.runner.close()

    def _end(self, error: Exception) -> None:
        """Every client has heard `error`: now the program that started Triton does."""
        self._delivery.flush()
        self._heartbeat.end(error)

    def _accept(self, request: Any) -> None:
        sender, runner = request.get_response_sender(), self._server.runner
        self._num_requests += 1
        name = repr(request.request_id()) if request.request_id() else f"#{self._num_requests}"
        try:
            refuse_unknown(request.parameters())
            tensors = _tensors(request)
            client = Client(
                name, sender, wants_stream(tensors), frozenset(request.requested_output_names())
            )
            if client.streams and not self._is_decoupled:
                raise UserError(
                    "stream is true, but this server was started with --unary; leave it out"
                )
            asked = read_request(tensors, runner.engine.limits, runner.tokenizer.encode)
            self._wait_for_place(sender)
            ticket = self._server.submit(asked, lambda answer: self._delivery.put(client, answer))
        except Exception as error:
            if isinstance(error, UserError) and not isinstance(error, BusyError):
                self._server.metrics.add("nvlm_requests_total", label="refused")
            log_end(name, error)
            send_last(sender, error_response(error))
            return
        self._delivery.watch(client, ticket)

    def _wait_for_place(self, sender: Any) -> None:
        while self._server.is_full:
            if sender.is_cancelled():
                self._server.metrics.add("nvlm_requests_total", label="cancelled")
                raise CancelledError
            time.sleep(_POLL_S)


def _open(parameters: dict[str, str]) -> Runner:
    """The runner of the form: both executors here, or both in other models of Triton."""
    engine_dir = Path(parameters["engine_dir"])
    if parameters["form"] == "torch":
        device = resolve_device(parameters["device"])
        max_step_ms = parameters["max_step_ms"]
        options = DecoderOptions(max_step_ms=None if max_step_ms == "auto" else float(max_step_ms))
        return Runner.open(engine_dir, device, options, os.environ)
    engine = EngineDir.read(engine_dir)
    from frontends.triton.models.remote_decoder import RemoteDecoderExecutor
    from frontends.triton.models.remote_vision import RemoteVisionExecutor

    url = parameters["grpc_url"]
    return Runner(engine, RemoteVisionExecutor(engine, url), RemoteDecoderExecutor(engine, url))


def _tensors(request: Any) -> dict[str, Any]:
    """The inputs a client sent, as arrays."""
    found = {
        spec.name: pb_utils.get_input_tensor_by_name(request, spec.name) for spec in NVLM_INPUTS
    }
    return {name: tensor.as_numpy() for name, tensor in found.items() if tensor is not None}
