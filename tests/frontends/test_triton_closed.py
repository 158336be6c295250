"""What a client may call of Triton's own APIs, and which pictures it may send."""

from __future__ import annotations

import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException

from frontends.triton.closed import CLOSED_APIS, closing_flags
from tests.support.triton_server import Served

# A call of each closed API: method and path of HTTP, a call of gRPC.
CALLS: dict[str, list[tuple[str, str, Any]]] = {
    "shared-memory": [
        ("GET", "systemsharedmemory/status", "get_system_shared_memory_status"),
        ("GET", "cudasharedmemory/status", "get_cuda_shared_memory_status"),
        ("POST", "systemsharedmemory/unregister", "unregister_system_shared_memory"),
    ],
    "model-repository": [("POST", "repository/index", "get_model_repository_index")],
    "trace": [("GET", "trace/setting", "get_trace_settings")],
    "logging": [("GET", "logging", "get_log_settings")],
}
assert set(CALLS) == set(CLOSED_APIS)
ALL = [(api, *call) for api, calls in CALLS.items() for call in calls]


def status_of(served: Served, method: str, path: str, header: str | None = None) -> int:
    url = f"http://127.0.0.1:{served.http}/v2/{path}"
    request = urllib.request.Request(url, method=method, data=b"{}" if method == "POST" else None)
    if header is not None:
        request.add_header("nvlm-closed", header)
    try:
        return int(urllib.request.urlopen(request, timeout=60).status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize(("api", "method", "path", "call"), ALL)
def test_clients_may_not_call_what_asking_does_not_need(
    triton_server: Served, api: str, method: str, path: str, call: str
) -> None:
    assert status_of(triton_server, method, path) == 403
    client = grpcclient.InferenceServerClient(f"127.0.0.1:{triton_server.grpc}")
    with pytest.raises(InferenceServerException, match="This protocol is restricted"):
        getattr(client, call)()
    client.close()


def test_who_reads_the_command_line_is_not_let_in_either(triton_server: Served) -> None:
    """The value ends with a newline, which no header can hold."""
    (tritonserver,) = (
        Path(f"/proc/{triton_server.process.pid}/task/{triton_server.process.pid}/children")
        .read_text()
        .split()
    )
    words = Path(f"/proc/{tritonserver}/cmdline").read_bytes().decode().split("\0")
    (rule,) = [word for word in words if word.startswith("--http-restricted-api=")]
    value = rule.rpartition("=")[2]
    assert value.endswith("\n")
    assert status_of(triton_server, "GET", "logging", value.strip()) == 403
    with pytest.raises(ValueError, match="Invalid header"):
        status_of(triton_server, "GET", "logging", value)


def test_what_probes_and_clients_need_is_open(triton_server: Served) -> None:
    for path in ("health/live", "health/ready", "models/nvlm/config", "models/stats"):
        assert status_of(triton_server, "GET", path) == 200, path


def test_an_api_is_opened_by_name_and_no_flag_is_given_for_none() -> None:
    http, grpc = closing_flags(("trace", "logging"))
    for flag in (http, grpc):
        assert "=shared-memory,model-repository:nvlm-closed=" in flag
    assert closing_flags(CLOSED_APIS) == []
    assert closing_flags() != closing_flags(), "drawn anew"
