"""Claims about the house: which room may use which."""

import ast
from pathlib import Path

# From the ground up: a room imports only from those before it, and from itself.
FLOORS = ["engine", "direct_align", "srpo_reward", "flux", "rewards", "recipe", "miniature", "evaluation",
          "baselines", "prepare", "train", "sample", "evaluate", "experiments"]
FILES = [path for room in FLOORS for path in (Path(f"{room}.py"), *Path(room).rglob("*.py")) if path.exists()]


def room_of(path):
    """The folder of the first floor in a path, or the file's own name."""
    return path.parts[0].removesuffix(".py")


def imported(path):
    """The rooms that a file imports from, wherever in it the import stands."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            rooms |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            rooms.add(node.module.split(".")[0])
    return rooms & set(FLOORS)


def test_every_room_has_a_floor():
    rooms = {path.stem for path in Path(".").glob("*.py")}
    rooms |= {path.parent.name for path in Path(".").glob("*/__init__.py")}
    assert rooms == set(FLOORS)


def test_imports_point_down():
    for path in FILES:
        below = FLOORS[:FLOORS.index(room_of(path)) + 1]
        assert imported(path) <= set(below), path
