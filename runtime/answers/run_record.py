"""<answers>.run.json: what made a file of answers, so that a rerun mixes no others into it.

The answers of two engines, of other settings or to other questions stay apart. The lines of the
answers themselves are the user's and stay as they are. A benchmark adds a section of its own to
the record (evaluation/asking/task_record.py); this file alone reads, checks and writes it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Union

from nvlm.inputs.images import PictureRules
from nvlm.program.errors import UserError, shown
from nvlm.program.json_files import read_json_object, write_json_beside
from runtime.engine.engine_dir import EngineDir
from runtime.requests.request_file import RequestLine
from runtime.requests.sampling import SamplingParams, non_neutral
from runtime.requests.types import GenerationRequest

log = logging.getLogger(__name__)

FORMAT_VERSION = 2
_DIGEST_CHARACTERS = 16
_ALWAYS = frozenset({"system", "prompt_format", "max_new_tokens"})
"""Settings that have no neutral value: their defaults may change."""

Types = Mapping[str, Union[type, tuple[type, ...], "Types"]]
"""What an object holds under each key: a type, several, or an object of its own."""


@dataclass(frozen=True, slots=True)
class EngineId:
    """Which engine it was: by its manifest's digest, since a folder may hold another by now."""

    digest: str  # SHA-256 of its manifest
    # Where it was then; empty: unknown.
    directory: str = dataclasses.field(default="", compare=False)

    @classmethod
    def of(cls, engine: EngineDir) -> EngineId:
        return cls(engine.manifest.digest, str(engine.directory.resolve()))

    def __repr__(self) -> str:
        return f"{self.directory or 'of an unknown folder'} ({self.digest[:8]})"


@dataclass(frozen=True, slots=True)
class RecordForm:
    """What one kind of run records, and what a user does about a record that is damaged."""

    fix: str  # as an imperative
    types: Types = dataclasses.field(default_factory=dict)  # beside those of every record
    optional: frozenset[str] = frozenset()  # keys in `types` that may be missing
    fault: Callable[[dict[str, Any]], str | None] = lambda _: None  # what else is wrong


BATCH = RecordForm("choose another --output_file")


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What made the answers of one file."""

    engine: EngineId  # that answered
    # Shared by all answers; settings at their neutral value are left out.
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    # A digest of each request, in order. None where an answer is older than the record.
    requests: list[str | None] = dataclasses.field(default_factory=list)
    # The section of a benchmark; empty in a batch.
    task: dict[str, Any] = dataclasses.field(default_factory=dict)
    format_version: int = FORMAT_VERSION  # of the record itself

    @classmethod
    def read(cls, path: Path, form: RecordForm) -> RunRecord:
        """Reads a record of this version or an older one.

        Raises `UserError` for a file that is anything else.
        """
        try:
            values = read_json_object(path)
        except UserError as error:
            raise UserError(f"{error}; {form.fix}") from None
        if values.get("format_version") == 1:
            values = _from_version_1(values)
        types: Types = {**_TYPES, **form.types}
        fault = _fault(values, types, form.optional) or form.fault(values)
        if fault is not None:
            raise UserError(f"{path} is no record of a run by this version: it {fault}; {form.fix}")
        return cls(**{**values, "engine": EngineId(**values["engine"])})

    def write(self, path: Path, flag: str) -> None:
        """Writes the record beside what `flag` names. Raises `UserError` where it cannot."""
        write_json_beside(path, asdict(self), flag)

    @property
    def decisive(self) -> dict[str, Any]:
        """What all answers in one file have in common."""
        return {"engine": self.engine, **self.settings}


def require_same(then: dict[str, Any], now: dict[str, Any], path: Path, flag: str) -> None:
    """Refuses to resume answers that `path` says something else made: another engine, say."""
    if differing := differences(then, now):
        name, was, is_now = differing[0]
        raise UserError(
            f"{path} says its answers were made with {name} {was} and this run has {is_now}; "
            f"choose another {flag}"
        )


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(name, value then, value now) of each setting that differs; "unset" where it is neutral."""

    def value_in(values: dict[str, Any], name: str) -> str:
        return shown(values[name]) if name in values else "unset"

    return [
        (name, value_in(then, name), value_in(now, name))
        for name in {**now, **then}
        if then.get(name, MISSING) != now.get(name, MISSING)
    ]


def record_path(answers: Path) -> Path:
    return answers.with_name(answers.name + ".run.json")


def resume(
    output: Path,
    engine: EngineDir,
    lines: list[RequestLine],
    num_finished: int,
    again: Collection[int] = (),
) -> None:
    """Refuses to resume after `num_finished` answers of another engine or to other requests. Those
    that failed are asked `again`, as they are now.

    Then records what the answers of this run are made of. Answers without a record, which an
    earlier version left, are resumed unverified.
    """
    path = record_path(output)
    digests: list[str | None] = [_digest(line) for line in lines]
    record = RunRecord(EngineId.of(engine), requests=digests)
    known: list[str | None] = []
    if num_finished and path.exists():
        earlier = RunRecord.read(path, BATCH)
        require_same(earlier.decisive, record.decisive, path, "--output_file")
        known = earlier.requests[:num_finished]
        if known and not any(known):
            log.warning(
                "%s is an earlier version's: its %d answers are kept without a look at their "
                "requests, which may have changed",
                path,
                len(known),
            )
    for position, then in enumerate(known):
        if position not in again and then not in (None, digests[position]):
            raise UserError(
                f"line {lines[position].number} of --input_file or a setting of it changed after "
                f"--output_file {output} had its answer; choose another --output_file, or cut "
                f"that one off from its line {position + 1} on to have those answered again"
            )
    kept = [*known, *[None] * (num_finished - len(known))]
    digests[:num_finished] = [digests[i] if i in again else kept[i] for i in range(num_finished)]
    record.write(path, "--output_file")


def settings_of(request: GenerationRequest) -> dict[str, Any]:
    """What decides an answer beside its content, as JSON has it, sampling among it.

    A setting at its neutral value is left out, so a setting that is added later changes nothing.
    """
    settings = {}
    for each in fields(request):
        if each.name in ("content", "history", "sampling", "guide"):
            continue
        value = getattr(request, each.name)
        default = each.default
        if each.default_factory is not MISSING:
            default = each.default_factory()
        if each.name in _ALWAYS or value != default:
            value = sorted(value) if isinstance(value, frozenset) else value
            value = asdict(value) if isinstance(value, PictureRules) else value
            settings[each.name] = list(value) if isinstance(value, tuple) else value
    guide = request.guide
    if guide is not None:
        settings[guide.name] = guide.text or True
    return {**settings, **non_neutral(request.sampling)}


def _digest(line: RequestLine) -> str:
    """A digest of what decides the answer: what is asked, the images' names as the line has them,
    and every setting. Neither the folder nor the order of the fields counts."""
    content: dict[str, Any] = {}
    if isinstance(line.request, GenerationRequest):
        *history, question = (
            (turn.role, [_content_of(part, line.folder) for part in turn.content])
            for turn in line.request.turns
        )
        content = {"content": question[1], **settings_of(line.request)}
        if history:  # left out otherwise, as in records older than conversations
            content["history"] = history
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGEST_CHARACTERS]


def _content_of(part: Any, folder: Path) -> Any:
    """Text as it is, an image as an object."""
    if isinstance(part, bytes):
        return {"image_sha256": hashlib.sha256(part).hexdigest()}
    if not isinstance(part, Path):
        return part
    return {"image": str(part.relative_to(folder) if part.is_relative_to(folder) else part)}


_TYPES: Types = {
    "engine": {"digest": str, "directory": str},
    "settings": dict,
    "requests": list,
    "task": dict,
    "format_version": int,
}
_MAY_HOLD_MORE = frozenset({"settings"})


def _fault(values: dict[str, Any], types: Types, optional: frozenset[str]) -> str | None:
    """What is wrong with a record; None for one in which everything is as expected."""
    if (version := values.get("format_version")) != FORMAT_VERSION:
        return f"has format_version {shown(version)}, expected {FORMAT_VERSION}"
    if (fault := _fault_in(values, types, optional)) is not None:
        return fault
    if not all(isinstance(digest, str | None) for digest in values["requests"]):
        return f"has requests {shown(values['requests'])}, expected strings or null"
    return None


def _fault_in(
    values: dict[str, Any], types: Types, optional: frozenset[str], is_open: bool = False
) -> str | None:
    if not is_open and (unknown := values.keys() - types.keys()):
        return f"has an unexpected {shown(min(unknown))}"
    for key, expected in types.items():
        if key not in values:
            if key in optional:
                continue
            return f"has no {key!r}"
        value = values[key]
        kinds = dict if isinstance(expected, Mapping) else expected
        if not isinstance(value, kinds) or isinstance(value, bool):
            names = kinds if isinstance(kinds, tuple) else (kinds,)
            expected_types = " or ".join(kind.__name__ for kind in names)
            return f"has {key} {shown(value)}, expected {expected_types}"
        if isinstance(expected, Mapping):
            inner: dict[str, Any] = values[key]
            fault = _fault_in(inner, expected, optional, key in _MAY_HOLD_MORE)
            if fault is not None:
                return fault
    return None


def _from_version_1(values: dict[str, Any]) -> dict[str, Any]:
    """A record as version 1 wrote it, in today's form; what was damaged stays so.

    Its digests of requests covered settings at their neutral value: they are not comparable, and
    such answers are resumed unverified. A benchmark's section stood beside its settings, and its
    settings held the engine and every value.
    """
    record: dict[str, Any] = {"settings": {}, "requests": [], "task": {}}
    digest, directory = values.get("engine"), ""
    if isinstance(values.get("requests"), list):
        record["requests"] = [None] * len(values["requests"])
    elif isinstance(values.get("settings"), dict):
        settings = dict(values["settings"])
        digest = settings.pop("engine", None)
        sampling = settings.pop("sampling", None)
        flat = {**settings, **(sampling if isinstance(sampling, dict) else {})}
        neutral = {"stop": [], **asdict(SamplingParams()), "seed": 0}  # its seed that was not given
        record["settings"] = {
            name: value
            for name, value in flat.items()
            if name not in neutral or value != neutral[name]
        }
        known = ("settings", "format_version")
        record["task"] = {name: value for name, value in values.items() if name not in known}
        if isinstance(data := record["task"].get("data"), dict):
            record["task"]["data"] = {k: v for k, v in data.items() if k != "engine_dir"}
            directory = data.get("engine_dir", "")
    return {
        **record,
        "engine": {"digest": digest, "directory": directory},
        "format_version": FORMAT_VERSION,
    }
