"""The pictures that a server reads, and those that it leaves alone whatever Pillow could do."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from nvlm.program.errors import UserError
from runtime.requests.types import GenerationRequest
from runtime.serving.picture_types import SERVER_PICTURE_TYPES, require_server_types
from runtime.serving.runner import Runner
from runtime.serving.server import Server
from tests.support.command import ROOT

OTHERS = ("PPM", "TGA", "ICO", "PCX", "JPEG2000", "DDS", "SGI", "IM", "QOI", "PDF", "MSP")


def saved(kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("1" if kind == "MSP" else "RGB", (32, 24)).save(file, kind)
    return file.getvalue()


def asked(*pictures: bytes) -> GenerationRequest:
    return GenerationRequest.images_first("What is it?", pictures)


@pytest.mark.parametrize("kind", SERVER_PICTURE_TYPES)
def test_each_type_of_the_list_is_known_by_its_first_bytes(kind: str) -> None:
    require_server_types(asked(saved(kind.upper())))


@pytest.mark.parametrize("kind", OTHERS)
def test_every_other_type_is_refused_by_name_of_the_list(kind: str) -> None:
    with pytest.raises(UserError, match="is none of PNG, JPEG, WebP, GIF, TIFF, BMP and AVIF"):
        require_server_types(asked(saved(kind)))


def test_the_picture_that_is_refused_is_named() -> None:
    with pytest.raises(UserError, match="image 2 of 2 is none of"):
        require_server_types(asked(saved("PNG"), b"%!PS-Adobe-3.0 EPSF-3.0"))


def test_a_file_of_two_types_goes_to_no_other_reader() -> None:
    """The PDF's reader looks for its mark after white space, HEIC's in a list of brands."""
    heic = b"\0\0\0\x1cftypheic\0\0\0\0mif1heicavif"
    for data in (b" \n%PDF-1.7", heic):
        with pytest.raises(UserError, match="is none of"):
            require_server_types(asked(data))


def test_a_server_refuses_it_before_anything_is_read(float32_engine_dir: Path) -> None:
    server = Server(Runner.open(float32_engine_dir, torch.device("cpu")))
    with pytest.raises(UserError, match="is none of"):
        server.submit(asked(saved("PPM")), print)
    assert server.num_open == 0
    server.close()


@pytest.mark.process
def test_in_a_servers_process_pillow_has_no_other_readers() -> None:
    """Whatever a file's first bytes say: it would try every reader that it has."""
    code = """
import io, sys
from PIL import Image
from nvlm.program.process import set_picture_types
from runtime.serving.picture_types import SERVER_PICTURE_TYPES
from tests.serving.test_picture_types import OTHERS, saved
files = {kind: saved(kind) for kind in OTHERS}
kept = {kind: saved(kind.upper()) for kind in SERVER_PICTURE_TYPES}
set_picture_types(SERVER_PICTURE_TYPES)
for kind, data in kept.items():
    assert Image.open(io.BytesIO(data)).format.upper() == kind.upper()
for kind, data in files.items():
    try:
        Image.open(io.BytesIO(data))
    except Image.UnidentifiedImageError:
        continue
    sys.exit(f"{kind} was opened")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
