"""Claims about the README: its index and its ledger are true, its links lead somewhere."""

import importlib
import re
from pathlib import Path

import pytest

import evaluate
from engine import old_flags as flags
from evaluation.study import __main__ as study

README = Path("README.md").read_text(encoding="utf-8")
TESTS = "\n".join(p.read_text(encoding="utf-8") for p in Path("tests").glob("test_*.py"))


def rows(heading):
    """The cells of the table under a heading, without its two header lines."""
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


INDEX, LEDGER = rows("Where is equation ...?"), rows("Where the released code departs from the paper")


def test_every_equation_has_a_row():
    assert [row[0] for row in INDEX] == [str(n) for n in range(1, 14)]


@pytest.mark.parametrize("row", INDEX, ids=lambda row: f"Eq. {row[0]}")
def test_every_equation_has_a_function_and_a_test(row):
    number, _, function, test = row[:4]
    if "not yet" in function:
        assert number in ("1", "2")
        return
    for name in re.findall(r"`(\w+\.\w+)`", function):
        module, attribute = name.split(".")
        doc = getattr(importlib.import_module(module), attribute).__doc__
        assert f"Eq. {number}" in doc or re.search(rf"Eqs\. [\d, and]*\b{number}\b", doc), (name, number)
    names = re.findall(r"`(test_\w+)`", test)
    assert names and all(f"def {name}(" in TESTS for name in names)


def test_every_deviation_has_a_row_and_a_test():
    assert [row[0] for row in LEDGER] == [f"D{n}" for n in range(1, 14)]
    for number in range(1, 14):
        assert re.search(rf"def test_d{number}_", TESTS), number


def test_every_flag_the_readme_names_exists(capsys):
    for argv in (["-h"], ["tally", "-h"]):
        with pytest.raises(SystemExit):
            study.main(argv)
    helps = flags.parser("").format_help() + evaluate.flags().format_help() + capsys.readouterr().out
    known = {word.strip("[],") for word in helps.split()} | {
        "--released", "--random-init", "--nproc_per_node", "--nnodes", "--rdzv_endpoint"}
    assert {flag for flag in re.findall(r"(?<![\w-])--[a-z][a-z_-]+", README)} <= known


def test_every_link_and_picture_exists():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert Path(target).exists(), target
