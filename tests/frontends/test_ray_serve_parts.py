"""What needs no Ray: where a request belongs, what a command line asks for, a replica's process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="requirements/serving.txt is not installed")
pytest.importorskip("prometheus_client", reason="requirements/serving.txt is not installed")

from frontends.ray_serve.affinity import affinity_key, ranks
from frontends.ray_serve.metrics import merged
from frontends.ray_serve.options import flags_of, read_options
from frontends.ray_serve.server_process import ServerProcess
from nvlm.program.errors import UserError
from tests.support.command import ROOT
from tests.support.waiting import eventually


def key(messages: list[Any], **fields: Any) -> str | None:
    return affinity_key(json.dumps({"messages": messages, **fields}).encode())


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def picture(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


SYSTEM = {"role": "system", "content": "You read scans."}
ANSWER = {"role": "assistant", "content": "1642"}


def test_a_picture_has_one_key_whatever_is_asked_of_it() -> None:
    first = key([user(picture("data:a"), text("Read it."))])
    assert first is not None
    assert key([SYSTEM, user(text("What colour?"), picture("data:a"))], stream=True) == first
    assert key([user(text("Hello")), ANSWER, user(picture("data:a"), picture("data:b"))]) == first
    assert key([user({"type": "input_image", "image_url": "data:a"})]) == first
    assert key([user(picture("data:b"), text("Read it."))]) != first


def test_a_conversation_keeps_its_key_from_turn_to_turn() -> None:
    first = [SYSTEM, user(text("Read the number."))]
    assert key([*first, ANSWER, user(text("And the next?"))]) == key(first) is not None


def test_conversations_that_share_a_system_prompt_are_not_sent_to_one_replica() -> None:
    assert key([SYSTEM, user(text("One"))]) != key([SYSTEM, user(text("Two"))])


def test_a_prompt_that_grows_keeps_its_key() -> None:
    begun = "x" * 2000
    first = affinity_key(json.dumps({"prompt": begun}).encode())
    assert affinity_key(json.dumps({"prompt": [begun + "y", "z"]}).encode()) == first is not None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[1]",
        b"\xff",
        b"[" * 100_000,
        b'{"messages": []}',
        b'{"messages": 1, "prompt": 2}',
        b'{"prompt": [[1, 2]]}',
        b'{"input": "x"}',
    ],
)
def test_what_has_no_key_goes_to_the_least_loaded(data: bytes) -> None:
    assert affinity_key(data) is None


@pytest.mark.parametrize("messages", [[1], [{"role": []}], [{"content": [1, {"image_url": 2}]}]])
def test_what_is_wrong_is_left_to_a_replica_to_say(messages: list[Any]) -> None:
    assert key(messages) is not None
    assert key([{"role": "user", "content": "\ud800"}]) is not None


NAMES = ("a", "b", "c", "d")
IDLE: dict[str, int | None] = dict.fromkeys(NAMES, 0)


def own(number: int, num_open: dict[str, int | None]) -> str:
    (first,), rest = ranks(f"key {number}", num_open, spill_at=8)
    assert rest == list(num_open)
    return first


def test_keys_are_spread_evenly() -> None:
    shares = Counter(own(number, IDLE) for number in range(4000))
    assert all(abs(share - 1000) < 120 for share in shares.values()), shares


def test_a_replica_that_goes_moves_no_other_ones_keys() -> None:
    left = {name: IDLE[name] for name in NAMES if name != "b"}
    for number in range(500):
        before, after = own(number, IDLE), own(number, left)
        assert after == before or before == "b"


def test_a_key_spills_over_once_its_replicas_batch_is_full() -> None:
    name = own(1, IDLE)
    assert ranks("key 1", {**IDLE, name: 7}, spill_at=8) == [[name], [*NAMES]]
    assert ranks("key 1", {**IDLE, name: 8}, spill_at=8) == [[*NAMES]]
    assert ranks("key 1", {**IDLE, name: None}, spill_at=8)[0] == [name], "not known: ask it"
    assert ranks(None, IDLE, spill_at=8) == [[*NAMES]]
    assert ranks("key 1", {}, spill_at=8) == [[]]


def test_metrics_of_all_replicas_have_their_names() -> None:
    head = "# HELP nvlm_x_total Counted\n# TYPE nvlm_x_total counter\n"
    page = head + 'nvlm_x_total{{outcome="stop"}} {}\n'
    both = merged([("a", page.format(1)), ("b", page.format(2))]).decode().splitlines()
    assert both == [
        "# HELP nvlm_x_total Counted",
        "# TYPE nvlm_x_total counter",
        'nvlm_x_total{outcome="stop",replica="a"} 1.0',
        'nvlm_x_total{outcome="stop",replica="b"} 2.0',
    ]
    assert merged([]) == b""


def test_a_replica_gets_the_flags_of_serve_py_and_a_port_of_its_own(
    engine_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    engine = os.path.relpath(engine_dir)
    given = ["--engine_dir", engine, "--num_replicas", "3", "--port", "80", "--max_queue_size", "5"]
    given += ["--log_text", "--access_log", "log", "--api_key_file", "keys"]
    options = read_options(given, num_cluster_gpus=0)
    assert (options.min_replicas, options.max_replicas, options.num_gpus) == (3, 3, 0)
    assert not options.is_autoscaled
    python, program, *flags = options.command
    assert (python, program) == (sys.executable, str(ROOT / "serve.py"))
    from frontends.openai.flags import parser

    arguments = parser().parse_args(flags)
    for each in (arguments, options.arguments):  # an ingress starts in another folder too
        assert each.engine_dir == engine_dir.resolve()
        assert each.access_log == str(tmp_path / "log")
        assert each.api_key_file == tmp_path / "keys"
    assert (arguments.host, arguments.port) == ("127.0.0.1", 0)
    assert (arguments.max_queue_size, arguments.log_text) == (5, True)


def test_a_replica_has_its_engines_ranks_on_a_cluster_with_gpus(engine_dir: Path) -> None:
    given = ["--engine_dir", str(engine_dir)]
    assert read_options(given, num_cluster_gpus=8).num_gpus == 1
    assert read_options([*given, "--device", "cpu"], num_cluster_gpus=8).num_gpus == 0
    scaled = read_options([*given, "--min_replicas", "1", "--max_replicas", "4"], 8)
    assert scaled.is_autoscaled
    assert scaled.target_ongoing_requests == pytest.approx(0.7 * scaled.spill_at)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_gpus", "2"], "--num_gpus is 2, expected 1, one for each rank"),
        (["--min_replicas", "3", "--max_replicas", "2"], "--max_replicas is 2, expected 3 or more"),
        (["--port", "0"], "--port is 0, expected"),
        (["--num_replica", "2"], "unrecognized arguments: --num_replica"),
    ],
)
def test_flags_that_make_no_sense_are_refused(
    engine_dir: Path, flags: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        read_options(["--engine_dir", str(engine_dir), *flags], num_cluster_gpus=8)


def test_a_config_file_has_switches_and_lists() -> None:
    asked = {"num_replicas": 2, "log_text": True, "restart": False, "host": None}
    asked["model_name"] = ["first", "second"]
    flags = ["--num_replicas", "2", "--log_text", "--model_name", "first", "second"]
    assert flags_of(asked) == flags


@pytest.mark.process
@pytest.mark.parametrize(
    "flags",
    [("--api_key_file", "/none"), ("--access_log", "/none/log"), ("--allowed_origin", "page")],
)
def test_a_mistake_of_a_servers_flag_is_reported_before_a_cluster_is_started(
    engine_dir: Path, flags: tuple[str, ...]
) -> None:
    words = [sys.executable, "-m", "frontends.ray_serve", "--engine_dir", engine_dir, "--port", "1"]
    done = subprocess.run([*words, *flags], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {flags[0]} ")
    assert done.stderr.count("\n") == 1


@pytest.mark.process
def test_a_port_that_is_taken_is_reported_before_a_cluster_is_started(engine_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        words = [sys.executable, "-m", "frontends.ray_serve", "--engine_dir", engine_dir]
        done = subprocess.run(
            [*words, "--port", port], cwd=ROOT, capture_output=True, text=True, check=False
        )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: cannot listen on 127.0.0.1 port {port}: ")


@pytest.mark.process
def test_an_address_without_a_cluster_is_one_line(engine_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    words = [sys.executable, "-m", "frontends.ray_serve", "--engine_dir", engine_dir]
    done = subprocess.run(
        [*words, "--address", address], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: --address {address}: there is no Ray cluster (")
    assert done.stderr.count("\n") == 1


@pytest.mark.process
def test_a_missing_engine_or_ray_is_one_line(engine_dir: Path, tmp_path: Path) -> None:
    hidden = tmp_path / "sitecustomize.py"
    hidden.write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'ray' else find(name, *a)\n"
    )
    for engine, message in ((tmp_path / "none", "none"), (engine_dir, "requirements/ray.txt")):
        done = subprocess.run(
            [sys.executable, "-m", "frontends.ray_serve", "--engine_dir", str(engine)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert done.stderr.count("\n") == 1, done.stderr


SERVER = """
import os, signal, sys, time
print("loading", file=sys.stderr, flush=True)
if len(sys.argv) > 1:
    sys.exit("error: the engine is damaged")
print("ready: http://127.0.0.1:4321/v1 serves nvlm-d on cpu", file=sys.stderr, flush=True)
open(PIDS, "w").write(str(os.getpid()))
time.sleep(600)
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "server.py"
    path.write_text(SERVER.replace("PIDS", repr(str(tmp_path / "pid"))))
    return path


def pid_in(path: Path) -> int:
    """The number that a server writes. The file is empty for a moment."""
    assert eventually(lambda: path.exists() and path.read_text() != "")
    return int(path.read_text())


@pytest.mark.process
def test_a_servers_port_is_known_once_it_is_ready(program: Path, tmp_path: Path) -> None:
    process = ServerProcess([sys.executable, str(program)])
    assert process.wait_until_ready() == 4321
    pid = pid_in(tmp_path / "pid")
    process.close()
    assert process.wait() == -signal.SIGTERM % 256
    assert eventually(lambda: not Path(f"/proc/{pid}").exists(), 5)


@pytest.mark.process
def test_a_server_that_cannot_start_says_why(program: Path) -> None:
    process = ServerProcess([sys.executable, str(program), "damaged"])
    with pytest.raises(RuntimeError, match=r"code 1: loading\nerror: the engine is damaged"):
        process.wait_until_ready()


@pytest.mark.process
def test_a_server_ends_with_a_starter_that_was_killed(program: Path, tmp_path: Path) -> None:
    code = (
        "import sys, time; from frontends.ray_serve.server_process import ServerProcess; "
        f"ServerProcess([sys.executable, {str(program)!r}]).wait_until_ready(); time.sleep(99)"
    )
    starter = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    pid = pid_in(tmp_path / "pid")
    starter.kill()
    starter.wait()
    assert eventually(lambda: not Path(f"/proc/{pid}").exists(), 10)
