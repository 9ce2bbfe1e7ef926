"""Claims about experiments/: how runs become numbers, and that every experiment runs from end to end."""

import importlib
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from builders import fixed

from engine.errors import UserError
from experiments import (
    common_mode,
    form_by_method,
    image_only,
    margin,
    pages,
    recovery,
    runs,
    styles,
    table1,
    when_to_stop,
)

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
    loud = {"step": 4, "watch": {}, "hacking": ["saturation drifted by -0.3"]}
    assert runs.first_warning([{"step": 1}, calm, {"step": 3}, loud, loud | {"step": 6}]) == 4
    assert runs.first_warning([calm]) is None


def test_seeds_become_a_mean_and_a_standard_error():
    """What a seed does not reach is left out, and the number of seeds says so; one seed has no error."""
    rows = pages.over_seeds([{"a": 1.0, "b": None}, {"a": 3.0, "b": 5.0}])
    assert rows["a"] == pages.Spread(2.0, pytest.approx(1.0), 2)
    assert rows["b"] == pages.Spread(5.0, None, 1)
    assert pages.spread([None]) is None
    shown = pages.table({"row": rows}, {"a": ("A", ".1%"), "b": ("B", "+.2f"), "c": ("C", ".1f")})
    assert shown.splitlines()[-1] == "| row | 200.0 ± 100.0 % | +5.00 | - |"


@pytest.mark.parametrize("of_seeds, of_prompts", [(0.3, 0.0), (0.0, 0.3), (0.2, 0.4)])
def test_the_error_of_pictures_has_both_sources(of_seeds, of_prompts):
    """A number that is seed + prompt, without anything else: the error is that of both means, as simulated."""
    draw = torch.Generator().manual_seed(0)
    means = []
    errors = []
    for _ in range(400):
        seeds = of_seeds * torch.randn(5, 1, generator=draw)
        prompts = of_prompts * torch.randn(1, 40, generator=draw)
        scores = [{str(i): [value] for i, value in enumerate(row)} for row in (seeds + prompts).tolist()]
        found = pages.of_pictures(scores)
        means.append(found.mean)
        errors.append(found.error**2)
        assert (found.seeds, found.pictures) == (5, 40)
    true = torch.tensor(means).std().item()
    assert torch.tensor(errors).mean().sqrt().item() == pytest.approx(true, rel=0.15)


def test_pictures_of_one_prompt_count_as_one_for_the_error():
    """Four equal pictures of each of three prompts say no more than one of each."""
    one = [{"a": [0.0], "b": [1.0], "c": [0.0]}]
    four = [{prompt: scores * 4 for prompt, scores in one[0].items()}]
    assert pages.of_pictures(one).error == pages.of_pictures(four).error
    assert (pages.of_pictures(one).pictures, pages.of_pictures(four).pictures) == (3, 12)


def test_a_difference_is_paired():
    """Two rows that differ by the same amount in every picture: no error, however much the pictures differ. The base
    is compared with every seed."""
    base = pages.Scored({"u": {"a": [0.0], "b": [0.9]}}, {})
    ours = [pages.Scored({"u": {"a": [0.1], "b": [1.0]}}, {})] * 3
    found = pages.paired(ours, [base])["u"]
    assert found.mean == pytest.approx(0.1) and found.error == pytest.approx(0) and found.seeds == 3


def test_n_is_the_number_of_scored_pictures(tmp_path):
    """The text of a page counts the lines that evaluate.py wrote, and not a flag."""
    lines = [{"row": row, "picture": f"{i:05d}", "prompt": f"p{i}", "category": "", "realism": 1.0}
             for row in ("base", "SRPO seed0") for i in range(7)]
    lines += [{"row": "SRPO seed0", "picture": f"diversity/0000{i}_{k}", "prompt": f"p{i}", "category": "",
               "diversity": 0.1} for i in range(2) for k in range(4)]
    found = pages.scored(lines, {"base": {"realism": 1.0}, "SRPO seed0": {"realism": 1.0, "frechet": 3.0}})
    rows = {"base": pages.pooled([found["base"]]), "SRPO": pages.pooled([found["SRPO seed0"]])}
    assert pages.counted(rows) == "7 pictures of held-out prompts for each row and seed; 8 for diversity; 1 seed."
    assert rows["SRPO"]["frechet"] == pages.Spread(3.0, None, 1)


def test_a_page_is_published_on_purpose_only(tmp_path, monkeypatch, capsys):
    """Without --publish it goes to --home and is compared with the published one; a trial's flags cannot be
    published, and its page names them."""
    published = tmp_path / "results"
    monkeypatch.setattr(pages, "RESULTS", published)

    def write(argv, mean):
        own = runs.parse(runs.parser("doc"), ["--home", str(tmp_path / "home"), *argv])
        rows = {"row": {"a": pages.Spread(mean, 0.01, 3), "b": pages.Spread(1.0, 0.01, 3), "c": "text"}}
        page = pages.Page("Title", "Claim.", "Result.", "Told.", [(rows, {"a": ("A", ".2f"), "b": ("B", ".2f")})])
        pages.write(own, "name", page, pages.pyplot.figure())
        return capsys.readouterr().out

    assert "There is no published page." in write([], 0.5) and not published.exists()
    write(["--publish"], 0.5)
    text = (published / "name.md").read_text()
    assert text.startswith("# Title\n\n**Claim.** Claim.\n\n**Result.** Result.") and "--publish" not in text
    said = write(["--pictures", "25", "--flags", "--steps 2"], 0.6)
    assert "Of 2 numbers that the published page has too, 1 agree" in said
    assert "row, A: 0.60 ± 0.01; published 0.50 ± 0.01" in said
    assert "--seeds 5 --pictures 25 --flags '--steps 2'" in (tmp_path / "home" / "pages" / "name.md").read_text()
    assert (published / "name.md").read_text() == text
    with pytest.raises(UserError, match="--publish --pictures 25: a published page has the default --pictures"):
        write(["--publish", "--pictures", "25"], 0.5)


def test_the_bars_of_a_share_end_at_0_and_100_per_cent():
    assert pages.ends_of(pages.Spread(0.99, 0.02, 3), 100) == [[pytest.approx(2)], [pytest.approx(1)]]
    assert pages.ends_of(pages.Spread(0.01, 0.02, 3), 100) == [[pytest.approx(1)], [pytest.approx(2)]]
    assert pages.ends_of(pages.Spread(0.01, 0.02, 3), 1) == [[0.02], [0.02]]


def test_a_run_is_made_once_and_named_by_its_flags(monkeypatch, tmp_path):
    made = []

    def train_main(argv):
        made.append(argv)
        out = argv[argv.index("--out") + 1]
        folder = runs.Path(out)
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "summary.json").write_text("{}")

    monkeypatch.setattr(runs.train, "main", train_main)
    own = SimpleNamespace(model="miniature", flags="--steps 2", home=str(tmp_path / "home"))
    first = runs.trained(own, "--form plain", 0)
    assert runs.trained(own, "--form plain", 0) == first and len(made) == 1
    assert runs.trained(own, "--form plain", 1) != first and runs.trained(own, "--form sgp", 0) != first
    assert not (first / "checkpoints").exists()
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


HOMES = {  # a file or a link in --home; what is said
    "thesis.tex": "is not the folder of experiments, and not empty", "pages": "pages: is a link, which is not followed"}


@pytest.mark.parametrize("name", HOMES)
def test_experiments_write_only_where_experiments_wrote(tmp_path, capsys, name):
    home = tmp_path / "home"
    home.mkdir()
    if name == "pages":
        (home / name).symlink_to(tmp_path)
    else:
        (home / name).write_text("mine")
    with pytest.raises(SystemExit) as stopped:
        when_to_stop.main(["--home", str(home)])
    assert stopped.value.code == 2 and HOMES[name] in capsys.readouterr().err
    assert [file.name for file in home.iterdir()] == [name]


def test_what_is_kept_is_the_best_gap_before_the_drift_warning():
    """And not the best of all, nor what is nearest to the truth; the warning is as far ahead as it was."""
    log = log_of(sgp=[0.0, 0.2, 0.3, 0.4], frechet=[9.0, 7.0, 8.0, 20.0], broken=[0.0, 0.0, 0.01, 0.2],
                 realism=[0.1, 0.8, 0.9, 1.0], alignment=[0.95, 0.95, 0.93, 0.5])
    for line in log:
        line["hacking"] = ["saturation drifted by -0.3"] if line["step"] >= 3 else []
    row = when_to_stop.numbers(log)
    assert (row["kept_at"], row["best_at"], row["warned"], row["broken_5"], row["ahead"]) == (2, 2, 3, 4, 1)
    assert row["fallen"] == 4 and when_to_stop.first_warned(log) == "saturation"
    for line in log:
        line["hacking"] = ["saturation drifted by -0.3"]
    assert when_to_stop.numbers(log)["kept"] is None
    for line in log:
        line["hacking"] = []
    row = when_to_stop.numbers(log)
    assert (row["kept_at"], row["best_at"], row["warned"], row["ahead"]) == (4, 2, None, None)
    assert when_to_stop.first_warned(log) == "none"


PAGES = {path.stem: json.loads(path.read_text()) for path in Path("experiments/results").glob("*.json")}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_says_what_its_json_says(name):
    """Every row of a JSON's tables stands in the page, number for number."""
    text = Path(f"experiments/results/{name}.md").read_text()
    for rows in PAGES[name]["tables"]:
        numbers = {row: {column: pages.Spread(**value) if isinstance(value, dict) else value
                         for column, value in cells.items()} for row, cells in rows.items()}
        assert any(pages.table(numbers, columns) in text for columns in columns_of(name)), list(rows)


def columns_of(name):
    """The columns of an experiment's tables."""
    if name == "recovery":
        return [{str(sigma): (f"sigma {sigma}", ".3f") for sigma in recovery.SIGMAS}]
    module = importlib.import_module(f"experiments.{name}")
    return [getattr(module, "COLUMNS", table1.COLUMNS), table1.APART, margin.COLUMNS, styles.COLUMNS]


@pytest.mark.parametrize("name", PAGES)
def test_a_page_begins_with_the_claim_and_what_came_out(name):
    title, claim, result, *_ = Path(f"experiments/results/{name}.md").read_text().split("\n\n")
    assert title.startswith("# ") and claim.startswith("**Claim.** ") and result.startswith("**Result.** ")
    assert claim.count("\n") == result.count("\n") == 0


@pytest.mark.parametrize("name", PAGES)
def test_the_number_of_pictures_on_a_page_is_that_of_its_scores(name):
    text = Path(f"experiments/results/{name}.md").read_text()
    for rows in PAGES[name]["tables"]:
        for row in rows.values():
            for cell in row.values():
                if isinstance(cell, dict) and cell["pictures"]:
                    assert re.search(rf"\b{cell['pictures']} (pictures|for|held-out prompts)", text)


def test_the_readmes_numbers_stand_in_the_pages_they_link():
    """Every number with a deviation, in a line or an entry that links results/NAME.md, is a cell of one of its
    pages."""
    for readme in map(Path, ("README.md", "experiments/README.md", "miniature/README.md", "miniature2/README.md",
                             "docs/LOG.md")):
        text = readme.read_text()
        for line in re.split(r"\n(?=- )", text) if readme.name == "LOG.md" else text.splitlines():
            names = re.findall(r"results/(\w+)\.md\)", line)
            pages = "".join(Path(f"experiments/results/{name}.md").read_text() for name in names)
            for number in re.findall(r"[+-]?\d+\.?\d* ± \d+\.?\d*", line) if names else []:
                assert number in pages, (readme, number)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["table1", "unbiased", "recovery", "common_mode", "intervals", "ablation",
                                  "second_recipe", "when_to_stop", "styles", "rare_words", "margin", "landing",
                                  "fast", "fp8_rollout", "lora", "ledger", "offline", "other_rewards", "image_only",
                                  "form_by_method", "cross_attention", "second_base"])
def test_every_experiment_runs_to_its_page(tmp_path, name):
    """Two updates, few pictures, one seed: a page with a table, a JSON and a picture."""
    module = importlib.import_module(f"experiments.{name}")
    quick = {"rare_words": ["--quick"], "form_by_method": ["--quick"], "offline": ["--photos", "20"],
             "image_only": ["--flags", SMALLEST.replace("--watch 4", "--watch 24")]}.get(name, [])
    module.main(["--seeds", "1", "--pictures", "24", "--home", str(tmp_path / "home"), "--flags", SMALLEST, *quick])
    results = tmp_path / "home" / "pages"
    text = (results / f"{name}.md").read_text()
    assert text.startswith("# ") and f"python -m experiments.{name} --seeds 1" in text and "|---|" in text
    assert json.loads((results / f"{name}.json").read_text())
    assert (results / f"{name}.png").stat().st_size > 10_000


def test_the_settings_of_a_row_are_chosen_by_realism_among_whole_pictures():
    """The most real of those that are neither broken nor misaligned; if there is none, the most whole."""
    looks = {"a": {"realism": 0.6, "broken": 0.0, "alignment": 0.95},
             "b": {"realism": 0.8, "broken": 0.02, "alignment": 0.91},
             "c": {"realism": 1.0, "broken": 0.3, "alignment": 0.95},
             "d": {"realism": 0.9, "broken": 0.0, "alignment": 0.5}}
    assert form_by_method.chosen(looks) == "b"
    assert form_by_method.chosen({name: looks[name] for name in "cd"}) == "c"
    assert form_by_method.in_words("--lr 4e-05 --threshold 0.24") == "lr 4e-05, threshold 0.24"
    assert form_by_method.in_words("--lr 4e-05 --threshold off") == "lr 4e-05"


def test_a_reward_relative_to_its_noised_picture_is_a_difference():
    """f(x) - f(x + noise), so a reward that is linear in the picture has no gradient but the noise's clipping."""
    inside = torch.full((2, 3, 8, 8), 0.5, requires_grad=True)
    (_, _, f), = image_only.Noised(fixed(lambda images: images.mean((2, 3))), 0).see(inside)
    assert 0 < f.abs().max() < 0.1
    gradient, = torch.autograd.grad(f.sum(), inside)
    assert gradient.abs().max() == 0
