"""Claims about the READMEs: index and ledger are true, links lead somewhere, every command runs."""

import glob
import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from builders import make_foreign_flux, make_foreign_reward
from scripts import call

import command
import evaluate
from experiments import bench, gpu

READMES = [Path("README.md"), *sorted(Path(".").glob("[a-z]*/README.md")), Path("docs/LOG.md"), Path("docs/ledger.md")]
README = READMES[0].read_text(encoding="utf-8")
TESTS = "\n".join(path.read_text(encoding="utf-8") for path in Path("tests").glob("test_*.py"))


def rows(text, heading):
    """The cells of the table under a heading, without its two header lines."""
    section = text.split(f"# {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


INDEX = rows(README, "Where is equation ...?")
LEDGER = rows(READMES[-1].read_text(encoding="utf-8"), "Where the released code departs from the paper")


def test_every_equation_has_a_row():
    assert [row[0] for row in INDEX] == [str(n) for n in range(1, 14)]


@pytest.mark.parametrize("row", INDEX, ids=[f"Eq. {row[0]}" for row in INDEX])
def test_every_equation_has_a_function_and_a_test(row):
    number, _, function, test = row[:4]
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


def test_the_ledgers_last_column_is_what_was_measured():
    """D5 comes with D6, and D13 is the words, with a page of their own."""
    measured, = json.loads(Path("experiments/results/ledger.json").read_text())["tables"]
    for number, *_, cell in LEDGER:
        if number not in ("D5", "D13"):
            row, = (row for name, row in measured.items() if name.endswith(f"({number})"))
            shares = [100 * row[column]["mean"] for column in ("realism", "alignment", "broken")]
            assert " / ".join(f"{share:.1f}" for share in shares) + " %" in cell, number


@pytest.mark.parametrize("path", READMES, ids=str)
def test_every_link_and_picture_exists(path):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target


def test_the_readme_is_one_sitting():
    assert README.count("\n") <= 180


def test_the_method_is_six_lines_of_train_py():
    block = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1].strip().splitlines()
    source = [line.strip() for line in Path("train.py").read_text(encoding="utf-8").splitlines()]
    assert len(block) == 6
    code = [line.split("  #")[0].strip() for line in source]
    assert all(line.split("  #")[0].strip() in code for line in block)


# ----------------------------------------------------------------------------------------------- the commands
def commands(path):
    """Every command in a fenced block of a README, in order, without its comment."""
    found = []
    text = path.read_text(encoding="utf-8")
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for line in block.splitlines() if not language else []:
            command = re.sub(r"\s{2,}#.*", "", line).split("&&")[-1].strip()
            if command.startswith(("python ", "torchrun ", "pytest")):
                found.append(command)
    return list(dict.fromkeys(found))


def test_the_readme_has_commands():
    """Set-up and main job, the tests, FLUX.1-dev on eight GPUs; and no language's block is taken for a command."""
    found = commands(READMES[0])
    assert len(found) > 8 and "pytest" in found and "python train.py --model miniature" in found
    assert any(command.startswith("torchrun") for command in found)


# The smallest size at which a command still does all that it does.
SMALLEST = {
    "train.py": ["--steps", "2", "--global-batch", "2", "--rollout-steps", "1", "--eval-steps", "1", "--watch", "2"],
    "sample.py": ["--eval-steps", "1"],
    "evaluate.py": ["--first", "3", "--eval-steps", "1"],
    "experiments.bench": ["--repeats", "1", "--batch", "2", "--rollout-steps", "1"],
    "experiments.race": ["--goal", "0", "--pictures", "8", "--batch", "2", "--rollout-steps", "1"],
    "experiments.card": [],
    "experiments.first_picture": ["--out", "runs/first.png"],
    "evaluation.study": [],
    "evaluation.report": [],
    "evaluation.film": [],
    "engine.merge": [],
    "miniature.build": ["-h"]}
for name in ("table1", "unbiased", "recovery", "common_mode", "intervals", "ablation", "second_recipe",
             "when_to_stop", "styles", "rare_words", "margin", "fast", "lora", "ledger", "offline", "landing",
             "fp8_rollout", "form_by_method", "other_rewards", "image_only", "cross_attention", "second_base"):
    SMALLEST[f"experiments.{name}"] = [
        "--seeds", "1", "--pictures", "24", "--flags",
        "--steps 1 --watch 4 --watch-every 1 --rollout-steps 2 --eval-steps 1 --batch 8"]
SMALLEST["experiments.image_only"][-1] = SMALLEST["experiments.image_only"][-1].replace("--watch 4", "--watch 24")
SMALLEST["experiments.rare_words"].append("--quick")
SMALLEST["experiments.form_by_method"].append("--quick")
SMALLEST["experiments.offline"] += ["--photos", "20"]
# Only their flags are read: on a GPU, with a machine's own paths, they are real.
FLAGS = {"train.py": command.flags, "evaluate.py": evaluate.flags().parse_args,
         "experiments.bench": bench.flags, "experiments.gpu": gpu.parser().parse_args}


def on_a_gpu(words):
    """Whether a command is for FLUX.1-dev."""
    runs_here = any(name in " ".join(words) for name in ("miniature", "my_flux", "--resume"))
    of_pictures = words[0] == "evaluate.py" and "--images" in words
    return not runs_here and not of_pictures and words[0] in FLAGS


# What the commands of the READMEs leave in a clone.
LEFT = {".git", "runs", "samples", "photographs", "my_prompts.txt", "study.html", "study.key.json", "bars.svg"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder that looks like a fresh clone, and where runs leave nothing in the clone; with what users
    bring."""
    folder = tmp_path_factory.mktemp("clone")
    for path in Path(".").iterdir():
        if path.name not in LEFT:
            (folder / path.name).symlink_to(path.resolve())
    make_foreign_flux(folder / "my_flux")
    make_foreign_reward(folder / "my_reward")
    (folder / "my_prompts.txt").write_text("a red circle\na blue square\na white triangle\n")
    return folder


def vote(folder):
    """What a rater would send back: every picture Excellent."""
    key = json.loads((folder / "study.key.json").read_text())
    cells = dict.fromkeys(("alignment", "realism", "detail", "aesthetics"), "Excellent")
    (folder / "votes").mkdir(exist_ok=True)
    saved = {"study": key["study"], "annotator": "Ada", "votes": dict.fromkeys(key["pictures"], cells)}
    (folder / "votes" / "ada.json").write_text(json.dumps(saved))


def words_of(command):
    """A command without torchrun or python before it."""
    words = shlex.split(command)
    if words.pop(0) == "torchrun":
        while words[0].startswith("--"):
            words.pop(0)
    return words[1:] if words[0] == "-m" else words


def run(command, place):
    """A command as it stands, at its smallest size; for a GPU, as far as its flags are read."""
    words = shlex.split(command)
    ranks = 0
    if words.pop(0) == "torchrun":
        while words[0].startswith("--"):
            name, _, value = words.pop(0).partition("=")
            ranks = int(value) if name == "--nproc_per_node" else ranks
    if words[0] == "-c":
        subprocess.run([sys.executable, *words], cwd=place, check=True, capture_output=True)
        return
    if words[0] == "-m":
        words.pop(0)
    script = words[0]
    if on_a_gpu(words) and not {"--plan", "-h"} & set(words):
        FLAGS[script](words[1:])
        return
    argv = [found for word in words[1:] for found in sorted(glob.glob(word, root_dir=place)) or [word]]
    folder = "photographs" if script == "train.py" else "runs/evaluate_miniature/base"
    argv = [re.sub(r"\bDIR\b", folder, word) for word in argv]
    if "tally" in argv:
        vote(place)
        argv[argv.index("votes/*.json")] = "votes/ada.json"
    if not {"-h", "--plan"} & set(argv):
        argv += SMALLEST[script]
    if "--images" in argv and script == "evaluate.py":
        argv += ["--metrics", "statistics"]  # the others' weights come from the hub
    module = [] if script.endswith(".py") else ["-m"]
    call(place / "printed", *module, script, *argv, ranks=ranks, folder=str(place))


def test_the_first_commands_of_the_readme_run(place):
    """The main job, samples and the table of it; of the others those for a GPU, as far as flags are read. The
    rest is in the slow test below."""
    for number, asked in enumerate(commands(READMES[0])):
        if not asked.startswith("pytest") and (number < 4 or on_a_gpu(words_of(asked))):
            run(asked, place)


@pytest.mark.slow
@pytest.mark.parametrize("path", READMES, ids=str)
def test_every_command_of_a_readme_runs(path, place):
    """In order, in what looks like a fresh clone. The folders' READMEs go on from the main README's run."""
    if path != READMES[0] and not (place / "runs" / "miniature").exists():
        for command in commands(READMES[0]):
            if not command.startswith("pytest"):
                run(command, place)
    for command in commands(path):
        print(command)
        if not command.startswith("pytest"):
            run(command, place)
