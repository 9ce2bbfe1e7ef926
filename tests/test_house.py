"""Claims about the house: which room may use which."""

import ast
from pathlib import Path

import pytest

# From the ground up: a room imports only from those before it, and from itself.
FLOORS = ["engine", "direct_align", "srpo_reward", "flow", "flux", "klein", "rewards", "recipe", "command", "miniature",
          "evaluation", "baselines", "prepare", "train", "sample", "evaluate", "experiments"]
ENGINE = ["loading", "stopping", "errors", "files", "paths", "hub", "command_line", "data", "model", "memory", "run",
          "merge"]
HOUSES = [(Path("."), FLOORS), (Path("engine"), ENGINE)]


def rooms_of(house):
    """The rooms of a folder: its files and its packages, without __init__.py."""
    files = {path.stem for path in house.glob("*.py")} - {"__init__"}
    return files | {path.parent.name for path in house.glob("*/__init__.py")}


def modules(path):
    """The dotted names that a file imports, wherever in it the import stands: ["engine", "model"] and so on."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ([*node.module.split("."), alias.name] for alias in node.names)


def imported(path, house):
    """The rooms of a house that a file imports from."""
    deep = len(house.parts)
    return {name[deep] for name in modules(path) if tuple(name[:deep]) == house.parts and len(name) > deep}


@pytest.mark.parametrize("house, floors", HOUSES, ids=str)
def test_every_room_has_a_floor(house, floors):
    assert rooms_of(house) == set(floors)


@pytest.mark.parametrize("house, floors", HOUSES, ids=str)
def test_imports_point_down(house, floors):
    for height, room in enumerate(floors):
        for path in (house / f"{room}.py", *(house / room).rglob("*.py")):
            if path.exists():
                assert imported(path, house) & set(floors) <= set(floors[:height + 1]), path
