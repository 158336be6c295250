"""Writes requirements/<name>.hashed.txt: the packages of <name>.txt and the hashes of their files.

    python -m tools.hashed_requirements cpu

pip itself says what it would install here and from which files; nothing is installed. torch is left
out: its wheels for CPUs and GPUs come from an index of their own. Install it first, then

    pip install --require-hashes --no-deps -r requirements/cpu.hashed.txt
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from nvlm.program.command_line import ArgumentParser, run
from nvlm.program.errors import UserError

FOLDER = Path(__file__).parents[1] / "requirements"
LEFT_OUT = ("torch", "triton", "cuda", "nvidia-")
"""torch and what its wheels for GPUs bring along."""


def main() -> int:
    parser = ArgumentParser((__doc__ or "").partition("\n")[0])
    parser.add_argument("name", help="of a file in requirements/, as cpu")
    arguments = parser.parse_args()
    source = FOLDER / f"{arguments.name}.txt"
    if not source.is_file():
        raise UserError(f"{source} does not exist, expected a file of requirements/")
    target = source.with_suffix(".hashed.txt")
    target.write_text(hashed(asked_of_pip(source), source.name))
    print(target)
    return 0


def asked_of_pip(source: Path) -> dict[str, Any]:
    """pip's installation report (format 1)."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    command += ["--disable-pip-version-check", "--report", "-", "--requirement", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise UserError(f"pip cannot resolve {source}: {reason}; see that it reaches its index")
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def hashed(report: dict[str, Any], name: str) -> str:
    """The text of a requirements file. Raises `UserError` for a package without a hash."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    machine = f"Python {version} on {sysconfig.get_platform()}"
    lines = [
        f"# {name} without torch, as pip resolved it for {machine}.",
        "# Made by tools/hashed_requirements.py, which says how it is installed.",
    ]
    packages = {}
    for item in report["install"]:
        metadata = item["metadata"]
        package = metadata["name"].lower().replace("_", "-")
        if package.startswith(LEFT_OUT):
            continue
        digest = item["download_info"].get("archive_info", {}).get("hashes", {}).get("sha256")
        if digest is None:
            raise UserError(f"pip names no sha256 of {package}; use an index that does")
        packages[package] = f"{package}=={metadata['version']} --hash=sha256:{digest}"
    return "\n".join([*lines, *(packages[package] for package in sorted(packages))]) + "\n"


if __name__ == "__main__":
    run(main)
