"""Claims about experiments/: how runs become numbers, and that every experiment runs from end to end."""

import importlib
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments import common_mode, margin, recovery, runs, styles, table1, when_to_stop

SMALLEST = "--steps 2 --watch 4 --watch-every 1 --rollout-steps 2 --refl-steps 1 --eval-steps 2 --batch 8"


def log_of(**columns):
    """A log of a look at every update: {column: its values}."""
    steps = zip(*columns.values(), strict=True)
    return [{"step": step, "watch": dict(zip(columns, values, strict=True))}
            for step, values in enumerate(steps, 1)]


def test_a_column_is_compared_where_the_gap_is_equal():
    """Between two looks it is interpolated; a run that never gets there has none."""
    log = log_of(sgp=[-0.2, 0.0, 0.2], redness=[0.0, 0.1, 0.3])
    assert runs.at_equal(log, "redness", "sgp", 0.1) == pytest.approx(0.2)
    assert runs.at_equal(log, "redness", "sgp", -0.3) == 0.0
    assert runs.at_equal(log, "redness", "sgp", 0.5) is None
    assert runs.first_step(log, "redness", lambda value: value > 0.05) == 2
    assert runs.first_step(log, "redness", lambda value: value > 1) is None


def test_the_first_warning_is_that_of_the_drift():
    calm = {"step": 2, "watch": {}, "hacking": []}
    loud = {"step": 4, "watch": {}, "hacking": ["saturation drifted"]}
    assert runs.first_warning([{"step": 1}, calm, {"step": 3}, loud, loud | {"step": 6}]) == 4
    assert runs.first_warning([calm]) is None


def test_seeds_become_a_mean_and_a_deviation():
    """What a seed does not reach is left out, and n says so; one seed has no deviation."""
    rows = runs.over_seeds([{"a": 1.0, "b": None}, {"a": 3.0, "b": 5.0}])
    assert rows["a"] == runs.Spread(2.0, pytest.approx(2**0.5), 2)
    assert rows["b"] == runs.Spread(5.0, None, 1)
    assert runs.spread([None]) is None
    shown = runs.table({"row": rows}, {"a": ("A", ".1%"), "b": ("B", "+.2f"), "c": ("C", ".1f")})
    assert shown.splitlines()[-1] == "| row | 200.0 ± 141.4 % | +5.00 | - |"


def test_a_run_is_made_once_and_named_by_its_flags(monkeypatch, tmp_path):
    made = []

    def train_main(argv):
        made.append(argv)
        out = argv[argv.index("--out") + 1]
        (tmp_path / "home").mkdir(exist_ok=True)
        folder = runs.Path(out)
        folder.mkdir()
        (folder / "summary.json").write_text("{}")

    monkeypatch.setattr(runs.train, "main", train_main)
    own = SimpleNamespace(model="miniature", flags="--steps 2", home=str(tmp_path / "home"))
    first = runs.trained(own, "--form plain", 0)
    assert runs.trained(own, "--form plain", 0) == first and len(made) == 1
    assert runs.trained(own, "--form plain", 1) != first and runs.trained(own, "--form sgp", 0) != first
    assert "--resume" in made[0]
    assert made[0][:2] == ["--model", "miniature"] and "--form plain --steps 2 --seed 0" in " ".join(made[0])


def test_the_common_mode_of_a_form_is_that_of_its_weights():
    """None where the two texts are taken in equal parts; half where the wanted one has three times the
    weight."""
    found = {setting.name: mode for setting, mode in common_mode.settings().items()}
    assert found["srp, both"] == found["cfg, both"] == found["branches, both"] == 0
    assert found["cfg, denoise only"] == 0.5 and found["sgp, both"] == 1
    assert found["plain, denoise only"] is None


def test_a_model_without_a_judge_and_flags_that_no_shell_reads_are_one_line(tmp_path, capsys):
    """Exit status 2, before any run is made."""
    for argv in (["--model", str(tmp_path)], ["--flags", "--steps '1"]):
        with pytest.raises(SystemExit) as stopped:
            when_to_stop.main([*argv, "--home", str(tmp_path / "home")])
        assert stopped.value.code == 2 and not (tmp_path / "home").exists()
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and argv[0] in said and "Traceback" not in said


def test_what_is_kept_is_the_best_gap_before_the_drift_warning():
    """And not the best of all, nor what is nearest to the truth; the warning is as far ahead as it was."""
    log = log_of(sgp=[0.0, 0.2, 0.3, 0.4], frechet=[9.0, 7.0, 8.0, 20.0], broken=[0.0, 0.0, 0.01, 0.2],
                 realism=[0.1, 0.8, 0.9, 1.0], alignment=[0.95, 0.95, 0.93, 0.5])
    for line in log:
        line["hacking"] = ["saturation drifted"] if line["step"] >= 3 else []
    row = when_to_stop.numbers(log)
    assert (row["kept_at"], row["best_at"], row["warned"], row["broken_5"], row["ahead"]) == (2, 2, 3, 4, 1)
    assert row["fallen"] == 4 and when_to_stop.first_warned(log) == "saturation"
    for line in log:
        line["hacking"] = ["saturation drifted"]
    assert when_to_stop.numbers(log)["kept"] is None
    for line in log:
        line["hacking"] = []
    row = when_to_stop.numbers(log)
    assert (row["kept_at"], row["best_at"], row["warned"], row["ahead"]) == (4, 2, None, None)
    assert when_to_stop.first_warned(log) == "none"


PAGES = {path.stem: json.loads(path.read_text()) for path in Path("experiments/results").glob("*.json")
         if "tables" in json.loads(path.read_text())}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_says_what_its_json_says(name):
    """Every row of a JSON's tables stands in the page, number for number."""
    text = Path(f"experiments/results/{name}.md").read_text()
    for rows in PAGES[name]["tables"]:
        numbers = {row: {column: value and runs.Spread(**value) for column, value in cells.items()}
                   for row, cells in rows.items()}
        assert any(runs.table(numbers, columns) in text for columns in columns_of(name)), list(rows)


def columns_of(name):
    """The columns of an experiment's tables."""
    if name == "recovery":
        return [{str(sigma): (f"sigma {sigma}", ".3f") for sigma in recovery.SIGMAS}]
    module = importlib.import_module(f"experiments.{name}")
    return [getattr(module, "COLUMNS", table1.COLUMNS), margin.COLUMNS, styles.COLUMNS]


def test_the_readmes_numbers_stand_in_the_pages_they_link():
    """Every number with a deviation, in a line that links results/NAME.md, is a cell of one of its pages."""
    for readme in (Path("README.md"), Path("experiments/README.md"), Path("miniature/README.md")):
        for line in readme.read_text().splitlines():
            names = re.findall(r"results/(\w+)\.md\)", line)
            pages = "".join(Path(f"experiments/results/{name}.md").read_text() for name in names)
            for number in re.findall(r"[+-]?\d+\.?\d* ± \d+\.?\d*", line) if names else []:
                assert number in pages, (readme, number)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["table1", "unbiased", "recovery", "common_mode", "intervals", "ablation",
                                  "second_recipe", "when_to_stop", "styles", "rare_words", "margin",
                                  "fast", "lora", "ledger", "offline"])
def test_every_experiment_runs_to_its_page(tmp_path, name):
    """Two updates, few pictures, one seed: a page with a table, a JSON and a picture."""
    module = importlib.import_module(f"experiments.{name}")
    quick = {"rare_words": ["--quick"], "offline": ["--photos", "20"]}.get(name, [])
    module.main(["--seeds", "1", "--pictures", "8", "--home", str(tmp_path / "home"), "--results",
                 str(tmp_path / "results"), "--flags", SMALLEST, *quick])
    text = (tmp_path / "results" / f"{name}.md").read_text()
    assert text.startswith("# ") and f"python -m experiments.{name} --seeds 1" in text and "|---|" in text
    assert json.loads((tmp_path / "results" / f"{name}.json").read_text())
    assert (tmp_path / "results" / f"{name}.png").stat().st_size > 10_000
