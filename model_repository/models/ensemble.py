"""TensorRT-LLM's name for `nvlm`: hands every request on and every answer back.

Not a Triton ensemble, because Triton does not pass a cancellation on to the step of an ensemble
that runs: its client would be gone and its slot taken until `max_tokens`.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import numpy as np
import triton_python_backend_utils as pb_utils

from model_repository.models.delivery import TICK_S, error_response, send_last

logger = logging.getLogger(__name__)


class TritonPythonModel:
    """A thread for each request, which `nvlm` bounds, and one that looks for clients gone."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        logging.basicConfig(stream=sys.stderr, format="ensemble: %(message)s")
        self._inputs = [row["name"] for row in config["input"]]
        self._model = config["parameters"]["model"]["string_value"]
        self._is_decoupled = pb_utils.using_decoupled_model_transaction_policy(config)
        self._lock = threading.Lock()
        self._open: dict[str, Any] = {}  # id -> response sender
        self._closing = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            threading.Thread(target=self._relay, args=(request, sender), daemon=True).start()

    def finalize(self) -> None:
        self._closing.set()

    def _relay(self, request: Any, sender: Any) -> None:
        request_id = uuid4().hex  # clients choose theirs without looking at each other
        with self._lock:
            self._open[request_id] = sender
        try:
            last = self._hand_on(request, request_id, sender)
        except Exception as error:
            last = error_response(error)
        with self._lock:  # Triton dies of a sender that is asked after its last response
            del self._open[request_id]
        if last is None:
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        else:
            send_last(sender, last)

    def _hand_on(self, request: Any, request_id: str, sender: Any) -> Any:
        """Sends all answers but the last, which a model that is not decoupled has alone."""
        tensors = (pb_utils.get_input_tensor_by_name(request, name) for name in self._inputs)
        given = [tensor for tensor in tensors if tensor is not None]
        for response in self._exec(request_id, given, list(request.requested_output_names())):
            if response.has_error():
                return pb_utils.InferenceResponse(error=response.error())
            if outputs := response.output_tensors():  # the last one may hold nothing
                answer = pb_utils.InferenceResponse(output_tensors=outputs)
                if not self._is_decoupled:
                    return answer
                sender.send(answer)
        return None

    def _exec(self, request_id: str, tensors: list[Any], outputs: list[str]) -> Iterator[Any]:
        request = pb_utils.InferenceRequest(
            model_name=self._model,
            request_id=request_id,
            requested_output_names=outputs,
            inputs=tensors,
        )
        yield from request.exec(decoupled=True) if self._is_decoupled else [request.exec()]

    def _watch(self) -> None:
        """Again at every tick while the request is open: `nvlm` may not have read it yet."""
        while not self._closing.wait(TICK_S):
            try:
                with self._lock:
                    gone = [key for key, sender in self._open.items() if sender.is_cancelled()]
                for request_id in gone:
                    self._stop(request_id)
            except Exception:
                logger.exception("a request could not be stopped")

    def _stop(self, request_id: str) -> None:
        """`text_input` and `max_tokens` say nothing here; no request may lack them."""
        arrays = {
            "text_input": np.array([[b""]], np.object_),
            "max_tokens": np.array([[0]], np.int32),
            "stop": np.array([[True]]),
        }
        tensors = [pb_utils.Tensor(name, array) for name, array in arrays.items()]
        for _ in self._exec(request_id, tensors, ["text_output"]):
            pass
