"""Claims about walkthrough.ipynb: it is docs/walkthrough.py, and what it shows was made by it."""

import json
import runpy
from pathlib import Path

import pytest

NOTEBOOK = json.loads(Path("walkthrough.ipynb").read_text())
MAKE = runpy.run_path("docs/notebook.py", run_name="notebook")
CELLS = MAKE["cells"](Path("docs/walkthrough.py").read_text())


def texts(outputs):
    """What a cell's outputs say, without pictures."""
    return ["".join(output.get("text", output.get("data", {}).get("text/plain", ""))) for output in outputs]


def test_the_notebook_has_the_cells_of_its_source():
    """Reviewed as a .py, and made again after every change."""
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in NOTEBOOK["cells"]] == CELLS


@pytest.mark.parametrize("number", range(3, 14))
def test_every_equation_has_a_heading(number):
    headings = [line for kind, source in CELLS if kind == "markdown" for line in source.splitlines()
                if line.startswith("## Eq")]
    numbers = [int(word) for line in headings for word in line.replace(":", " ").split() if word.isdigit()]
    assert number in numbers


def test_what_it_shows_is_stored():
    """So it reads well where it is not run; and it stays small."""
    pictures = [output for cell in NOTEBOOK["cells"] for output in cell.get("outputs", [])
                if "image/png" in output.get("data", {})]
    assert len(pictures) == 9 and Path("walkthrough.ipynb").stat().st_size < 1_000_000


@pytest.mark.slow
def test_the_notebook_says_what_its_code_says():
    """Every cell runs, in order, and prints what is stored."""
    again = MAKE["notebook"](Path("docs/walkthrough.py").read_text())
    for now, then in zip(again["cells"], NOTEBOOK["cells"], strict=True):
        for a, b in zip(texts(now.get("outputs", [])), texts(then.get("outputs", [])), strict=True):
            if "/tmp" not in b:  # a run names its folder, and counts seconds
                assert a == b
