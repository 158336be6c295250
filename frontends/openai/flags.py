"""The flags of serve.py, in groups."""

from __future__ import annotations

from pathlib import Path

from nvlm.program.command_line import ArgumentParser, port_number, positive_float, positive_int
from runtime.serving.launch import add_engine_flags, add_queue_flag

_DESCRIPTION = "Step 3 as a server: answers OpenAI's API over HTTP with an engine directory."


def parser(description: str = _DESCRIPTION, prog: str | None = None) -> ArgumentParser:
    """prog: the command as `--help` shows it, where that is not the script's name."""
    parser = ArgumentParser(description, prog)
    add_engine_flags(parser, is_service=True)
    _add_access_flags(parser)
    _add_picture_flags(parser)
    _add_limit_flags(parser)
    _add_operation_flags(parser)
    _add_log_flags(parser)
    return parser


def _add_access_flags(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("address and access").add_argument
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is every network")
    add(
        "--port",
        type=port_number,
        default=8000,
        help="port to listen on; 0 takes a free one",
    )
    add(
        "--model_name",
        nargs="+",
        default=["nvlm-d"],
        metavar="NAME",
        help="names under which clients may ask for the model (default: nvlm-d)",
    )
    add(
        "--api_key_file",
        type=Path,
        metavar="FILE",
        help="file of the keys that clients may send as `Authorization: Bearer KEY`, one a line "
        "(default: no key is needed)",
    )
    add(
        "--allowed_host",
        nargs="+",
        default=[],
        metavar="NAME",
        help="names that a request's Host header may have (default: this machine's names if "
        "--host is the machine itself, else any name)",
    )
    add(
        "--allowed_origin",
        nargs="+",
        default=[],
        metavar="ORIGIN",
        help="origins of other web pages that may ask from a browser, such as "
        "https://chat.example (default: none)",
    )


def _add_picture_flags(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("pictures").add_argument
    add(
        "--allowed_media_domain",
        nargs="+",
        default=[],
        metavar="HOST",
        help="hosts that pictures may be fetched from (default: none; requests carry their "
        "pictures)",
    )
    add(
        "--max_media_bytes",
        type=positive_int,
        default=32 << 20,
        metavar="BYTES",
        help="largest picture to fetch, in bytes (default: %(default)s, 32 MiB)",
    )
    add(
        "--media_timeout_s",
        type=positive_float,
        default=10.0,
        metavar="SECONDS",
        help="seconds that fetching a picture may take",
    )
    add(
        "--max_image_pixels",
        type=positive_int,
        metavar="N",
        help="largest picture to read, in pixels (default: 178,956,970, where Pillow stops)",
    )
    add(
        "--num_preparing",
        type=positive_int,
        default=2,
        metavar="N",
        help="threads that decode and tile pictures",
    )


def _add_limit_flags(parser: ArgumentParser) -> None:
    add = parser.add_argument_group(
        "limits", "A request beyond them is refused, or its connection is closed."
    ).add_argument
    add_queue_flag(add)
    add(
        "--max_body_bytes",
        type=positive_int,
        default=64 << 20,
        metavar="BYTES",
        help="largest body of a request, in bytes (default: %(default)s, 64 MiB)",
    )
    add(
        "--max_open_bytes",
        type=positive_int,
        default=1 << 30,
        metavar="BYTES",
        help="bytes that the bodies of all unanswered requests may have together "
        "(default: %(default)s, 1 GiB)",
    )
    add(
        "--header_timeout_s",
        type=positive_float,
        default=15.0,
        metavar="SECONDS",
        help="seconds in which a request's headers must arrive",
    )
    add(
        "--body_timeout_s",
        type=positive_float,
        default=60.0,
        metavar="SECONDS",
        help="seconds in which a request's body must arrive",
    )
    add(
        "--write_timeout_s",
        type=positive_float,
        default=60.0,
        metavar="SECONDS",
        help="seconds that a client may read nothing of its answer",
    )


def _add_operation_flags(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("operation").add_argument
    add(
        "--num_threads",
        type=positive_int,
        metavar="N",
        help="torch's CPU threads (default: torch's choice)",
    )
    add(
        "--drain_s",
        type=positive_float,
        default=30.0,
        metavar="SECONDS",
        help="seconds after SIGTERM in which accepted requests are still answered",
    )
    add(
        "--hang_after_s",
        type=positive_float,
        metavar="SECONDS",
        help="seconds without progress after which the server counts as hung (default: computed "
        "from the engine's plan)",
    )
    add(
        "--restart",
        action="store_true",
        help="start the server again after a part of it died, three times in ten minutes at most",
    )


def _add_log_flags(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("log").add_argument
    add(
        "--access_log",
        default="-",
        metavar="FILE",
        help="file that gets a line of JSON for each request; - is stderr, none is no log",
    )
    add(
        "--log_text",
        action="store_true",
        help="write prompts and answers into the access log too",
    )
