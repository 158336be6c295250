"""Counts how a code base is built, and sets several beside each other.

    python -m tools.code_figures [--markdown] [--engine_dir DIR] CHECKOUT [CHECKOUT ...]

Reads the files of each checkout and runs nothing of them; `--engine_dir` adds the journey of one
question (tools/journey.py), which needs a checkout of this project.
Each figure has its rule in `FIGURES`. What no program can count stands in docs/log.md by hand.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import re
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nvlm.program.command_line import ArgumentParser, run
from nvlm.program.errors import UserError


@dataclass(frozen=True, slots=True)
class Project:
    """Where a code base keeps what is counted. All paths are relative to its root."""

    name: str
    marker: str  # a file that only this project has
    product: tuple[str, ...]  # globs of the folders and files that its users run
    documents: tuple[str, ...]  # globs
    step: tuple[str, ...]  # functions that take one step of the decoder
    sampling: str  # a sampling setting that it has
    carriers: tuple[str, ...]  # classes that hold one request on its way to the answer


OURS = ("nvlm", "build", "runtime", "evaluation", "frontends", "model_repository", "*.py")

PROJECTS = (  # the first whose marker is there
    Project(
        name="nvlm-engine",
        marker="runtime/serving/loop.py",
        product=OURS,
        documents=("docs/*.md", "docs/decisions/*.md"),
        step=("step",),
        sampling="top_p",
        carriers=(
            *("GenerationRequest", "Ticket", "DecoderRequest", "Sequence"),
            *("StepOutput", "Answer", "GenerationResult"),
        ),
    ),
    Project(
        name="nvlm-engine, before the one loop",
        marker="convert_checkpoint.py",
        product=OURS,
        documents=("docs/*.md", "docs/decisions/*.md"),
        step=("step",),
        sampling="top_p",
        carriers=(
            *("GenerationRequest", "Ticket", "PreparedRequest", "EncodedRequest", "_Answer"),
            *("DecoderRequest", "Sequence"),
            *("StepOutput", "TextDelta", "Answer", "GenerationResult"),
        ),
    ),
    Project(
        name="nano-vllm",
        marker="nanovllm/llm.py",
        product=("nanovllm",),
        documents=("README.md",),
        step=("step",),
        sampling="temperature",
        carriers=("Sequence",),
    ),
    Project(
        name="nanochat",
        marker="nanochat/engine.py",
        product=("nanochat", "scripts"),
        documents=("dev/LOG.md",),
        step=("forward",),
        sampling="top_k",
        carriers=("RowState",),
    ),
    Project(
        name="mini-sglang",
        marker="python/minisgl/core.py",
        product=("python/minisgl",),
        documents=("docs/*.md",),
        step=("normal_loop", "overlap_loop"),
        sampling="top_p",
        carriers=(
            *("OpenAICompletionRequest", "TokenizeMsg", "UserMsg", "PendingReq", "Req", "Batch"),
            *("DetokenizeMsg", "UserReply"),
        ),
    ),
)


@dataclass(frozen=True, slots=True)
class CodeBase:
    """A project's files, read once."""

    project: Project
    root: Path
    trees: dict[Path, ast.Module]  # of the product's files
    sources: dict[Path, str]

    @classmethod
    def read(cls, root: Path) -> CodeBase:
        """Raises `UserError` for a folder that holds none of the projects."""
        project = next((row for row in PROJECTS if (root / row.marker).is_file()), None)
        if project is None:
            markers = " or ".join(row.marker for row in PROJECTS)
            raise UserError(f"{root} has no {markers}; give the root of a checkout")
        found = [path for pattern in project.product for path in root.glob(pattern)]
        paths = [
            inner for path in found for inner in ([path] if path.is_file() else path.rglob("*.py"))
        ]
        sources = {path: path.read_text() for path in sorted(set(paths))}
        trees = {path: ast.parse(source) for path, source in sources.items()}
        return cls(project, root, trees, sources)

    def nodes(self) -> Iterator[ast.AST]:
        return itertools.chain.from_iterable(map(ast.walk, self.trees.values()))

    def functions(self) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
        return [node for node in self.nodes() if isinstance(node, kinds)]

    def num_files_naming(self, pattern: str) -> int:
        """Product files whose code (no comment, no docstring) has `pattern` in a name or text."""
        wanted = re.compile(pattern, re.IGNORECASE)
        return sum(any(map(wanted.search, code_words(tree))) for tree in self.trees.values())


def docstrings(tree: ast.AST) -> Iterator[ast.Constant]:
    """Docstrings of module, classes and functions, and those that stand below a field."""
    for node in ast.walk(tree):
        for part in ast.iter_child_nodes(node):
            if isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant):
                yield part.value


def code_words(tree: ast.AST) -> Iterator[str]:
    ignored = {id(constant) for constant in docstrings(tree)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in ignored:
                yield node.value
            continue
        for name in ("id", "attr", "arg", "name", "asname", "module"):
            if isinstance(word := getattr(node, name, None), str):
                yield word


def prose(text: str) -> str:
    """The sentences of a Markdown page: no code, tables, headings, links' targets or HTML."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"\]\([^)]*\)|<[^>]*>", "", text)
    lines = [
        line for line in text.splitlines() if not re.match(r"    |#|\||\s*$", line) or not line
    ]
    return "\n".join(re.sub(r"^\s*(?:[-*]|\d+\.)\s", "\n", line) for line in lines)


def sentences(text: str) -> list[list[str]]:
    """Words of each sentence: it ends with `.`, `!` or `?` and a space, or with its paragraph.

    One or two words are a label and not a sentence.
    """
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", prose(text))]
    parts = [re.split(r"(?<=[.!?])[)\"*]*\s+", paragraph) for paragraph in paragraphs]
    words = [part.split() for part in itertools.chain.from_iterable(parts)]
    return [sentence for sentence in words if len(sentence) > 2]


def readme(code: CodeBase) -> list[Path]:
    return [code.root / "README.md"]


def documents(code: CodeBase) -> list[Path]:
    return [path for pattern in code.project.documents for path in code.root.glob(pattern)]


def sentence_lengths(paths: list[Path]) -> list[int]:
    """Words of each sentence."""
    return [len(words) for path in paths for words in sentences(path.read_text())]


def words_a_sentence(paths: list[Path]) -> str:
    lengths = sentence_lengths(paths)
    return f"{statistics.mean(lengths):.1f}" if lengths else "none"


def long_sentences(paths: list[Path]) -> str:
    """How many of the sentences have more than 25 words."""
    lengths = sentence_lengths(paths)
    return f"{sum(length > 25 for length in lengths)} of {len(lengths)}"


def fullest_folder(code: CodeBase) -> str:
    folders = Counter(path.parent for path in code.trees)
    folder, count = folders.most_common(1)[0]
    return f"{count} ({folder.relative_to(code.root)})"


def of_docstrings(code: CodeBase) -> str:
    """Counts everything but tests, so benchmarks and tools too."""
    paths = [path.relative_to(code.root) for path in code.root.rglob("*.py")]
    sources = [
        (code.root / path).read_text() for path in paths if not {"tests", ".venv"} & set(path.parts)
    ]
    trees = [ast.parse(source) for source in sources if '"""Of ' in source]
    texts = (doc.value for tree in trees for doc in docstrings(tree))
    return str(sum(isinstance(text, str) and text.startswith("Of ") for text in texts))


def file_lengths(code: CodeBase) -> str:
    lengths = [len(source.splitlines()) for source in code.sources.values()]
    lengths = [length for length in lengths if length > 1]  # more than an empty package's
    return f"{statistics.median(lengths):.0f} / {max(lengths)}"


def function_lengths(code: CodeBase) -> str:
    lengths = sorted((node.end_lineno or 0) - node.lineno + 1 for node in code.functions())
    return f"{statistics.median(lengths):.0f} / {lengths[len(lengths) * 9 // 10]} / {lengths[-1]}"


def steppers(code: CodeBase) -> list[str]:
    """Functions that take steps of the decoder and hand out what comes of them.

    A function of the step's own name passes a step on and does not count.
    """
    found = []
    for path, tree in code.trees.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or node.name in code.project.step:
                continue
            calls = [part.func for part in ast.walk(node) if isinstance(part, ast.Call)]
            names = {call.attr for call in calls if isinstance(call, ast.Attribute)}
            if names & set(code.project.step):
                found.append(f"{path.relative_to(code.root)}:{node.name}")
    return found


def carriers(code: CodeBase) -> str:
    """The project's table, whose every class must exist."""
    classes = {node.name for node in code.nodes() if isinstance(node, ast.ClassDef)}
    gone = [name for name in code.project.carriers if name not in classes]
    if gone:
        raise UserError(
            f"{code.root} has no class {', '.join(gone)}; correct `carriers` in {Path(__file__)}"
        )
    return str(len(code.project.carriers))


FIGURES: dict[str, Callable[[CodeBase], str]] = {
    "product files": lambda code: str(len(code.trees)),
    "lines of a file, median / max": file_lengths,
    "lines of a function, median / p90 / max": function_lengths,
    "modules in the fullest folder": fullest_folder,
    "functions that take the decoder's steps": lambda code: str(len(steppers(code))),
    "carriers of a request": carriers,
    "files that name a sampling setting": lambda code: str(
        code.num_files_naming(rf"\b{code.project.sampling}\b")
    ),
    "files that name FP8 or E4M3": lambda code: str(code.num_files_naming(r"fp8|e4m3")),
    "docstrings that begin with Of, outside tests": of_docstrings,
    "words, README": lambda code: str(
        sum(len(path.read_text().split()) for path in readme(code)),
    ),
    "words a sentence, README": lambda code: words_a_sentence(readme(code)),
    "words a sentence, docs": lambda code: words_a_sentence(documents(code)),
    "sentences of more than 25 words, README and docs": lambda code: long_sentences(
        [*readme(code), *documents(code)]
    ),
}


def journey(code: CodeBase, engine_dir: Path) -> str:
    """Files and changes of file of one question; empty for another project."""
    if not (code.root / "run.py").is_file():
        return ""
    program = Path(__file__).with_name("journey.py")
    command = [sys.executable, str(program), "--engine_dir", str(engine_dir)]
    done = subprocess.run(
        [*command, "--checkout", str(code.root)], capture_output=True, text=True, check=True
    )
    files, changes = re.findall(r"\d+", done.stdout)[:2]
    return f"{files} / {changes}"


def table(codes: list[CodeBase], engine_dir: Path | None) -> list[list[str]]:
    """Rows of one cell for the name and one for each code base."""
    rows = [["", *(code.project.name for code in codes)]]
    rows += [[name, *map(count, codes)] for name, count in FIGURES.items()]
    if engine_dir is not None:
        asked = [journey(code, engine_dir) for code in codes]
        rows.append(["files / changes of file of one question", *asked])
    return rows


def parser() -> argparse.ArgumentParser:
    parser = ArgumentParser((__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("checkouts", type=Path, nargs="+", metavar="CHECKOUT", help="root of a code base")
    add("--markdown", action="store_true", help="print a Markdown table")
    add("--engine_dir", type=Path, help="ask it one question too; made by build_engine.py")
    return parser


def main() -> None:
    given = parser().parse_args()
    codes = [CodeBase.read(checkout.resolve()) for checkout in given.checkouts]
    rows = table(codes, given.engine_dir and given.engine_dir.resolve())
    if given.markdown:
        rows.insert(1, ["---"] * len(rows[0]))
        print(*("| " + " | ".join(row) + " |" for row in rows), sep="\n")
        return
    width = max(len(row[0]) for row in rows)
    for name, *cells in rows:
        print(name.ljust(width), *(cell.ljust(30) for cell in cells))
    for code in codes:
        print(f"{code.project.name}: steps are taken by {', '.join(steppers(code)) or 'none'}")


if __name__ == "__main__":
    run(main)
