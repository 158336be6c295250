"""<answers>.run.json: what made a file of answers, so that a rerun does not mix two engines', or
answers to other questions. The lines themselves are the user's and stay as they are."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nvlm.errors import UserError
from nvlm.json_files import read_json_object, write_json_beside
from runtime.request_file import RequestLine
from runtime.types import GenerationRequest

FORMAT_VERSION = 1
_DIGEST_CHARACTERS = 16


@dataclass(frozen=True, slots=True)
class AnswerRecord:
    """`engine`: the manifest's digest; `requests`: a digest of each line, in order. None where an
    answer is older than the record."""

    engine: str
    requests: list[str | None]
    format_version: int = FORMAT_VERSION

    @classmethod
    def read(cls, path: Path) -> AnswerRecord | None:
        """None for answers that have no record: an earlier version wrote none."""
        if not path.exists():
            return None
        try:
            record = cls(**read_json_object(path))
        except UserError as error:
            raise UserError(f"{error}; choose another --output_file") from None
        except TypeError:
            record = cls("", [], 0)
        is_ours = record.format_version == FORMAT_VERSION and isinstance(record.engine, str)
        if not is_ours or not isinstance(record.requests, list):
            raise UserError(
                f"{path} is no record of answers by this version; choose another --output_file"
            )
        return record

    def write(self, path: Path) -> None:
        write_json_beside(path, asdict(self), "--output_file")


def record_path(answers: Path) -> Path:
    return answers.with_name(answers.name + ".run.json")


def take_over(output: Path, engine: str, lines: list[RequestLine], num_finished: int) -> None:
    """Refuses to go on behind `num_finished` answers of another engine or to other requests, and
    notes what the answers of this run are made of."""
    path = record_path(output)
    earlier = AnswerRecord.read(path) if num_finished else None
    digests: list[str | None] = [_digest(line) for line in lines]
    if earlier is None:
        digests[:num_finished] = [None] * num_finished
    else:
        if earlier.engine != engine:
            raise UserError(
                f"--output_file {output} holds answers of another engine (its manifest's digest "
                f"was {earlier.engine[:8]}, now {engine[:8]}); choose another --output_file"
            )
        known = [*earlier.requests[:num_finished], *[None] * num_finished][:num_finished]
        for position, then in enumerate(known):
            line, now = lines[position], digests[position]
            if then not in (None, now):
                raise UserError(
                    f"line {line.number} of --input_file or a setting of it changed after "
                    f"--output_file {output} had its answer; choose another --output_file, or cut "
                    f"that one off from its line {position + 1} on to have those answered again"
                )
        digests[:num_finished] = known
    AnswerRecord(engine, digests).write(path)


def _digest(line: RequestLine) -> str:
    """Of what decides the answer: what is asked, the images' names as the line has them, and every
    setting; nor folder nor order of the fields."""
    told = _told(line.request, line.folder) if isinstance(line.request, GenerationRequest) else {}
    return hashlib.sha256(repr(told or "no request").encode(errors="surrogatepass")).hexdigest()[
        :_DIGEST_CHARACTERS
    ]


def _told(request: GenerationRequest, folder: Path) -> dict[str, Any]:
    content = [
        ("image", str(part.relative_to(folder) if part.is_relative_to(folder) else part))
        if isinstance(part, Path)
        else part
        for part in request.content
    ]
    return {
        "content": content,
        "system": request.system,
        "prompt_format": request.prompt_format,
        "max_num_tiles": request.max_num_tiles,
        "max_new_tokens": request.max_new_tokens,
        "stop": request.stop,
        "sampling": asdict(request.sampling),
    }
