"""Where a Megatron-Core checkpoint keeps its ranks.

`latest_checkpointed_iteration.txt` names the iteration (or "release"); its folder holds
`mp_rank_TT/model_optim_rng.pt`, with pipeline parallelism `mp_rank_TT_PPP/` (megatron/training/
checkpointing.py, get_checkpoint_name).
"""

from __future__ import annotations

import re
from pathlib import Path

from nvlm.formats import layout
from nvlm.program.errors import UserError, shown

RANK_FILE = "model_optim_rng.pt"

_ITERATION = re.compile(r"iter_\d{7,}|release")
_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?")


def is_megatron(model_dir: Path) -> bool:
    """Whether this is a checkpoint of Megatron's, or one iteration of it."""
    return model_dir.is_dir() and (
        (model_dir / layout.MEGATRON_TRACKER).is_file()
        or _is_iteration(model_dir)
        or bool(_folders(model_dir, _ITERATION))
    )


def iteration_dir(model_dir: Path) -> Path:
    """The folder of the iteration that Megatron itself would load."""
    if _is_iteration(model_dir):
        return model_dir
    tracker = model_dir / layout.MEGATRON_TRACKER
    if tracker.is_file():
        text = tracker.read_bytes()[:80].decode("ascii", errors="replace").strip()
        if text != "release" and not re.fullmatch(r"[0-9]+", text):
            raise UserError(
                f"{tracker} holds {shown(text)}, expected the number of an iteration or 'release'; "
                "give the iteration's folder as --model_dir"
            )
        folder = model_dir / (text if text == "release" else f"iter_{int(text):07d}")
        if not folder.is_dir():
            raise UserError(
                f"{tracker} names iteration {text}, but {folder} does not exist; copy it there or "
                "give another iteration's folder as --model_dir"
            )
        return folder
    folders = _folders(model_dir, _ITERATION)
    if len(folders) != 1:
        raise UserError(
            f"{model_dir} has {len(folders)} iterations and no {layout.MEGATRON_TRACKER}; give the "
            "folder of one as --model_dir"
        )
    return folders[0]


def rank_files(iteration: Path) -> list[list[Path]]:
    """Every rank's file: one list per pipeline stage, one file in it per tensor-parallel rank."""
    places = {}
    for folder in _folders(iteration, re.compile(r"mp_rank_.*")):
        match = _RANK.fullmatch(folder.name)
        if match is None or folder.name != _rank_name(match[1], match[2]):
            raise UserError(
                f"{folder} is not the folder of a rank, expected mp_rank_TT or mp_rank_TT_PPP "
                "(tensor and pipeline rank; expert parallelism has no place in NVLM-D)"
            )
        places[folder] = match
    if not places:
        raise UserError(_no_ranks(iteration))
    staged = {match[2] is not None for match in places.values()}
    if len(staged) > 1:
        raise UserError(
            f"{iteration} mixes mp_rank_TT with mp_rank_TT_PPP folders, which are of two "
            "checkpoints; expected one kind, move the other away"
        )
    files = {
        (int(match[2] or 0), int(match[1])): folder / RANK_FILE for folder, match in places.items()
    }
    pp_size, tp_size = (max(rank[axis] for rank in files) + 1 for axis in (0, 1))
    ranks = [[(pp, tp) for tp in range(tp_size)] for pp in range(pp_size)]
    for pp, tp in (rank for stage in ranks for rank in stage):
        path = iteration / _rank_name(tp, pp if staged == {True} else None) / RANK_FILE
        if (pp, tp) not in files or not path.is_file():
            raise UserError(
                f"{path} is missing, expected the files of {tp_size} tensor-parallel x {pp_size} "
                "pipeline ranks; copy it there"
            )
    return [[files[rank] for rank in stage] for stage in ranks]


def _rank_name(tp: str | int, pp: str | int | None) -> str:
    return f"mp_rank_{int(tp):02d}" + ("" if pp is None else f"_{int(pp):03d}")


def _no_ranks(iteration: Path) -> str:
    if _is_distributed(iteration):
        return (
            f"{iteration} is a distributed checkpoint (--ckpt-format torch_dist or zarr), expected "
            "--ckpt-format torch; run Megatron's training script on it once with "
            "--ckpt-convert-format torch --ckpt-convert-save DIR and give that folder"
        )
    return f"{iteration} has no mp_rank_* folders, expected one per rank; copy the checkpoint again"


def _is_iteration(folder: Path) -> bool:
    return bool(_folders(folder, re.compile(r"mp_rank_.*"))) or _is_distributed(folder)


def _is_distributed(folder: Path) -> bool:
    is_zarr = (folder / "metadata.json").is_file() and (folder / "common.pt").is_file()
    return is_zarr or (folder / ".metadata").is_file() or any(folder.glob("*.distcp"))


def _folders(parent: Path, name: re.Pattern[str]) -> list[Path]:
    return sorted(p for p in parent.iterdir() if name.fullmatch(p.name) and p.is_dir())
