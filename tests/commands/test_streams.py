"""What a program prints reaches somebody or is an error, and libraries print nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PRINTS = "from nvlm.program.command_line import run\nrun(lambda: print('answer'))"
SILENT = "from nvlm.program.command_line import run\nrun(lambda: None)"
DAMAGED_TIFF = """
import io
from PIL import Image
from nvlm.inputs.images import load_image
from nvlm.program.command_line import run
def main():
    file = io.BytesIO()
    Image.effect_noise((300, 300), 50).save(file, "TIFF", compression="tiff_adobe_deflate")
    data = bytearray(file.getvalue())
    data[2000:2100] = bytes(value ^ 0x55 for value in data[2000:2100])
    load_image(bytes(data), "the scan")
run(main)
"""


def finished(program: str, redirection: str = "") -> subprocess.CompletedProcess[str]:
    command = f'exec "$0" -c "$1" {redirection}'
    words = ["sh", "-c", command, sys.executable, program]
    root = Path(__file__).parents[2]
    return subprocess.run(words, capture_output=True, text=True, check=False, cwd=root)


def test_a_closed_stdout_is_an_error_of_who_prints() -> None:
    found = finished(PRINTS, ">&-")
    assert found.returncode == 2
    assert found.stderr.startswith("error: stdout is closed, and the answer goes there; ")
    assert len(found.stderr.splitlines()) == 1
    assert finished(PRINTS).stdout == "answer\n"
    silent = finished(SILENT, ">&-")
    assert (silent.returncode, silent.stderr) == (0, "")


def test_remarks_of_libtiff_stay_out_of_stderr() -> None:
    found = finished(DAMAGED_TIFF)
    assert found.returncode == 2
    assert found.stderr.startswith("error: the scan is not a whole image")
    assert len(found.stderr.splitlines()) == 1
