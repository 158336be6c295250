"""What clients do to a Triton server under load: over HTTP, over gRPC, and to its sockets."""

from __future__ import annotations

import base64
import http.client
import json
import queue
import random
import socket
import struct
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException

from tests.faults.load import GoneError
from tests.faults.questions import Question
from tests.support.triton_server import Served, tensors

ANSWER_S = 120
_LONG = "Tell me everything."
_DIED = ("has ended", "has made no progress", "the decoder has failed")
_STOPS = ("has no available versions", "the server is stopping", "Server is stopping")
_AWAY = ("UNAVAILABLE", "StatusCode.CANCELLED", "no longer in valid state", *_DIED, *_STOPS)

# What a request must not hold, and a word of the refusal.
INVALID: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": -1}, "max_tokens is -1"),
    ({"text_input": b"\xff"}, "UTF-8"),
    ({"image_bytes": [b"no"]}, "is none of PNG"),
    ({"image_bytes": [b"\x89PNG\r\n\x1a\n" + bytes(50)]}, "not a whole image"),
    ({"image_url_input": [b"http://x/"]}, "fetches nothing"),
    ({"temperature": float("nan")}, "temperature is nan"),
    ({"beam_width": 4}, "beam_width"),
]


class TritonDoor:
    """Clients of one server; `answers` are the questions' own."""

    def __init__(self, served: Served, questions: list[Question], answers: list[str]) -> None:
        self._served = served
        self._asked = list(zip(questions, answers, strict=True))
        self.deeds: dict[str, Callable[[random.Random], str | None]] = {
            "valid, gRPC stream": self._stream,
            "valid, gRPC whole": self._whole,
            "valid, ensemble": self._ensemble,
            "valid, HTTP": self._http,
            "valid, HTTP slowly": self._http_slowly,
            "invalid": self._invalid,
            "invalid JSON": self._invalid_json,
            "cancelled": self._cancelled,
            "half-closed": self._half_closed,
            "hung up": self._hung_up,
        }

    def _draw(self, choice: random.Random) -> tuple[Question, str]:
        return choice.choice(self._asked)

    def _stream(self, choice: random.Random) -> str | None:
        question, expected = self._draw(choice)
        return _differs(self._infer(question, stream=True), expected)

    def _whole(self, choice: random.Random) -> str | None:
        question, expected = self._draw(choice)
        return _differs(self._infer(question), expected)

    def _ensemble(self, choice: random.Random) -> str | None:
        """Which takes no picture files."""
        texts = [asked for asked in self._asked if not asked[0].pictures]
        question, expected = choice.choice(texts)
        return _differs(self._infer(question, "ensemble", stream=True), expected)

    def _http(self, choice: random.Random) -> str | None:
        question, expected = self._draw(choice)
        status, answer = self._post(_json_of(question))
        return _differs(answer.get("text_output", f"{status}: {answer}"), expected)

    def _http_slowly(self, choice: random.Random) -> str | None:
        """Its body comes in pieces, with pauses."""
        question, expected = self._draw(choice)
        body = _json_of(question)
        cuts = sorted(choice.randrange(len(body)) for _ in range(3))
        connection = http.client.HTTPConnection("127.0.0.1", self._served.http, timeout=ANSWER_S)
        try:
            connection.putrequest("POST", "/v2/models/nvlm/generate")
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders()
            for begin, end in zip([0, *cuts], [*cuts, len(body)], strict=True):
                connection.send(body[begin:end])
                time.sleep(choice.random() * 0.1)
            answer = _refuse_end(json.load(connection.getresponse()))
        except (ConnectionError, http.client.BadStatusLine) as error:
            raise GoneError(str(error)) from None
        finally:
            connection.close()
        return _differs(answer.get("text_output", str(answer)), expected)

    def _invalid(self, choice: random.Random) -> str | None:
        changed, message = choice.choice(INVALID)
        fields = {"text_input": "x", "max_tokens": 4, **changed}
        text, number = fields.pop("text_input"), fields.pop("max_tokens")
        try:
            answer = self._call("nvlm", tensors(text, number, **fields))
        except InferenceServerException as error:
            return None if message in str(error) else f"{changed} was refused with {error}"
        return f"{changed} was answered with {answer!r}"

    def _invalid_json(self, choice: random.Random) -> str | None:
        body = choice.choice((b"{", b"[]", b'{"text_input": "x"}', b'{"text_input": 3}', b"\0\xff"))
        status, answer = self._post(body)
        return None if "error" in answer else f"{body!r} was answered with {status} {answer}"

    def _cancelled(self, choice: random.Random) -> str | None:
        client = self._client()
        with suppress(InferenceServerException):  # the server went away
            client.start_stream(lambda result, error: None)
            client.async_stream_infer("nvlm", tensors(_LONG, 1000, stream=True))
            time.sleep(choice.random() * 0.05)
            client.stop_stream(cancel_requests=True)
        client.close()
        return None

    def _half_closed(self, choice: random.Random) -> str | None:
        """It asks, ends its own side, and reads what comes, if anything does."""
        body = _json_of(self._draw(choice)[0])
        with self._connected() as connection, suppress(OSError):
            connection.sendall(_head(len(body)) + body)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass
        return None

    def _hung_up(self, choice: random.Random) -> str | None:
        """In the middle of its body, or of the answer; by a reset."""
        body = json.dumps({"text_input": _LONG, "max_tokens": 60, "stream": True}).encode()
        sent = choice.choice((0, len(body) // 2, len(body)))
        with self._connected() as connection, suppress(OSError):
            connection.sendall(_head(len(body), "generate_stream") + body[:sent])
            if sent == len(body):
                connection.recv(1000)
            linger = struct.pack("ii", 1, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        return None

    def _client(self) -> Any:
        return grpcclient.InferenceServerClient(f"127.0.0.1:{self._served.grpc}")

    def _infer(self, question: Question, model: str = "nvlm", *, stream: bool = False) -> str:
        files = {"image_bytes": question.files} if question.pictures else {}
        inputs = tensors(question.text, question.max_tokens, stream=stream, **files)
        return self._call(model, inputs)

    def _call(self, model: str, inputs: list[grpcclient.InferInput]) -> str:
        """The text of the answer. Raises its error, or `GoneError`."""
        came: queue.Queue[tuple[Any, Any]] = queue.Queue()
        client = self._client()
        pieces = []
        try:
            client.start_stream(lambda result, error: came.put((result, error)))
            client.async_stream_infer(model, inputs, enable_empty_final_response=True)
            while True:
                result, error = _next(came, client)
                if error is not None:
                    raise error
                response = result.get_response()
                if response.outputs:
                    pieces.append(result.as_numpy("text_output").reshape(-1)[0].decode())
                if response.parameters["triton_final_response"].bool_param:
                    client.stop_stream()
                    return "".join(pieces)
        except InferenceServerException as error:
            if any(word in str(error) for word in _AWAY):
                raise GoneError(str(error)) from None
            raise
        finally:
            client.close()

    def _post(self, body: bytes) -> tuple[int, dict[str, Any]]:
        url = f"http://127.0.0.1:{self._served.http}/v2/models/nvlm/generate"
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_S) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, _refuse_end(json.load(error))
        except TimeoutError:
            raise
        except OSError as error:
            raise GoneError(str(error)) from None

    def _connected(self) -> socket.socket:
        try:
            return socket.create_connection(("127.0.0.1", self._served.http), timeout=ANSWER_S)
        except OSError as error:
            raise GoneError(str(error)) from None


def _refuse_end(answer: dict[str, Any]) -> dict[str, Any]:
    """Raises `GoneError` for an error of a server that ends."""
    if any(word in str(answer.get("error", "")) for word in (*_DIED, *_STOPS)):
        raise GoneError(str(answer))
    return answer


def _next(came: queue.Queue[tuple[Any, Any]], client: Any) -> tuple[Any, Any]:
    """What comes next. A stream that the server ends without an answer is an end too, of which
    tritonclient reports to nobody."""
    end = time.monotonic() + ANSWER_S
    while True:
        is_open = client._stream._handler.is_alive()  # before the last look
        try:
            return came.get(timeout=0.5 if is_open else 0.0)
        except queue.Empty:
            assert time.monotonic() < end, f"no answer in {ANSWER_S} s"
            if not is_open:
                raise GoneError("the stream ended without an answer") from None


def _differs(found: str, expected: str) -> str | None:
    return None if found == expected else f"{found!r} is not {expected!r}"


def _json_of(question: Question) -> bytes:
    fields: dict[str, Any] = {"text_input": question.text, "max_tokens": question.max_tokens}
    if question.pictures:
        fields["image_base64"] = [base64.b64encode(data).decode() for data in question.files]
    return json.dumps(fields).encode()


def _head(num_bytes: int, path: str = "generate") -> bytes:
    lines = (
        f"POST /v2/models/nvlm/{path} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {num_bytes}",
        "Connection: close",
    )
    return ("\r\n".join(lines) + "\r\n\r\n").encode()
