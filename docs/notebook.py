"""Make walkthrough.ipynb from docs/walkthrough.py, with what its cells print and draw: python docs/notebook.py

In the .py, "# %%" begins a cell of code, and "# %% [markdown]" a cell of text. Start it in the project's folder.
"""

import ast
import base64
import io
import json
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path

import matplotlib
from matplotlib import pyplot

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
matplotlib.use("Agg")
pyplot.show = lambda: None  # the figures are stored

SOURCE = Path("docs/walkthrough.py")
NOTEBOOK = Path("walkthrough.ipynb")


def cells(text):
    """[(kind, source)] of a .py: kind is "markdown" or "code"."""
    found = []
    for kind, source in re.findall(r"^# %%( \[markdown\])?\n(.*?)(?=^# %%|\Z)", text, re.S | re.M):
        if kind:
            source = re.sub(r"^# ?", "", source, flags=re.M)
        found.append(("markdown" if kind else "code", source.strip("\n")))
    return found


def run(source, names):
    """Run a cell in the namespace `names`. Returns its outputs as a notebook has them: what it prints, the value of its
    last line, and its figures."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    value = None
    with redirect_stdout(printed):
        exec(compile(tree, str(SOURCE), "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), str(SOURCE), "eval"), names)
    outputs = []
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": lines(printed.getvalue())})
    for number in pyplot.get_fignums():
        png = io.BytesIO()
        pyplot.figure(number).savefig(png, format="png", dpi=70)
        data = {"image/png": base64.b64encode(png.getvalue()).decode()}
        outputs.append({"output_type": "display_data", "data": data, "metadata": {}})
    pyplot.close("all")
    if value is not None:
        outputs.append({"output_type": "execute_result", "execution_count": None, "metadata": {},
                        "data": {"text/plain": lines(repr(value))}})
    return outputs


def lines(text):
    """A text as a notebook keeps it: a list of lines, each with its end."""
    return text.splitlines(keepends=True)


def notebook(text):
    """The notebook of a .py, as a dict."""
    names = {"__name__": "__main__"}
    found = []
    for number, (kind, source) in enumerate(cells(text)):
        cell = {"cell_type": kind, "id": f"cell{number}", "metadata": {}, "source": lines(source)}
        if kind == "code":
            cell |= {"execution_count": None, "outputs": run(source, names)}
        found.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": found, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


if __name__ == "__main__":
    from engine.errors import UserError, frame
    from engine.files import must_be_ours, write_whole

    with frame("notebook"):
        if not SOURCE.is_file():
            raise UserError(f"{SOURCE}: no such file; start it in the project's folder")
        must_be_ours(NOTEBOOK, b'"id": "cell0"', f"made from {SOURCE}", "folder")
        write_whole(NOTEBOOK, json.dumps(notebook(SOURCE.read_text()), indent=1) + "\n")
        print(NOTEBOOK)
