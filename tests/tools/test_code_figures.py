"""The counts of tools/code_figures.py on code whose figures are known."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvlm.program.errors import UserError
from tests.support.command import ROOT
from tools.code_figures import (
    CodeBase,
    fullest_folder,
    long_sentences,
    of_docstrings,
    sentences,
    steppers,
    table,
)

ENGINE = '''
"""Of a module: a comment does not name top_p."""

def takes_steps(engine):
    while outputs := engine.step():
        print(outputs, "top_p", "fp8")

def takes_none(engine):
    takes_steps(engine)

class Recorder:
    def step(self):
        return self.engine.step()  # passed on
'''


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The smallest nano-vllm: a marker, its carrier and who steps."""
    (tmp_path / "nanovllm" / "layers").mkdir(parents=True)
    (tmp_path / "nanovllm" / "llm.py").write_text("class Sequence:\n    temperature = 0.0\n")
    (tmp_path / "nanovllm" / "engine.py").write_text(ENGINE)
    (tmp_path / "README.md").write_text("# Title\n\nOne two three. Four five six seven!\n")
    return tmp_path


def test_who_passes_a_step_on_does_not_count(checkout: Path) -> None:
    assert steppers(CodeBase.read(checkout)) == ["nanovllm/engine.py:takes_steps"]


def test_comments_and_docstrings_name_nothing(checkout: Path) -> None:
    code = CodeBase.read(checkout)
    (checkout / "nanovllm" / "words.py").write_text('"""fp8"""\n# top_p\n')
    again = CodeBase.read(checkout)
    assert code.num_files_naming("fp8") == again.num_files_naming("fp8") == 1
    assert code.num_files_naming("top_p") == again.num_files_naming("top_p") == 1


def test_a_table_has_a_row_per_figure_and_a_cell_per_code_base(checkout: Path) -> None:
    code = CodeBase.read(checkout)
    rows = table([code, code], None)
    assert {len(row) for row in rows} == {3}
    assert ["words a sentence, README", "3.5", "3.5"] in rows
    assert fullest_folder(code) == "2 (nanovllm)"
    assert of_docstrings(code) == "1"


def test_a_sentence_of_more_than_25_words_is_long(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"{'word ' * 24}end. {'word ' * 25}end.\n")
    assert long_sentences([page]) == "1 of 2"


def test_a_carrier_that_is_gone_asks_for_the_table_to_be_corrected(checkout: Path) -> None:
    (checkout / "nanovllm" / "llm.py").write_text("class Request: ...\n")
    with pytest.raises(UserError, match="no class Sequence; correct `carriers`"):
        table([CodeBase.read(checkout)], None)


def test_this_checkout_is_known_and_its_table_of_carriers_holds() -> None:
    rows = table([CodeBase.read(ROOT)], None)
    assert rows[0][1].startswith("nvlm-engine")


def test_a_folder_that_is_no_code_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give the root of a checkout"):
        CodeBase.read(tmp_path)


def test_code_tables_and_labels_are_no_sentences() -> None:
    labels = "# A heading of words\n\n**Why.** It is so.\n\n    python code.py here\n\n"
    text = f"{labels}| a b c | d |\n- One more [link here](x.md).\n"
    assert [" ".join(words) for words in sentences(text)] == ["It is so.", "One more [link here."]
