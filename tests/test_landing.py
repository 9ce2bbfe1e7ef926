"""Claims about --land: a run ends where its watched pictures score the SGP gap of photographs."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from builders import make_photographs

import flow
import rewards
import srpo_reward as sr
import train
from engine.errors import UserError
from engine.memory import parallel
from engine.model.folder import Model
from evaluation import landing
from evaluation.report.curves import read_log
from evaluation.report.page import read_run
from evaluation.watch import slower, sure

SMALL = ["--model", "miniature", "--recipe", "fast", "--global-batch", "8", "--lr", "1e-4", "--eval-steps", "4",
         "--watch", "8", "--watch-every", "2", "--eval", "0"]


LEVEL = 0.08


def run(out, *argv):
    train.main([*SMALL, "--out", str(out), *map(str, argv)])


def log_of(out):
    return read_log(out / "log.jsonl")


@pytest.fixture(scope="module")
def landed(tmp_path_factory):
    """A run that may make 20 updates, and lands before."""
    out = tmp_path_factory.mktemp("landing") / "run"
    run(out, "--steps", 20, "--land", LEVEL)
    return out


def test_a_run_ends_at_the_first_look_that_has_reached_the_level(landed):
    log = log_of(landed)
    looks = [line for line in log if "watch" in line]
    last = looks[-1]["step"]
    assert log[-1]["step"] == last < 20
    assert [line["landed"] for line in looks] == [False] * (len(looks) - 1) + [True]
    assert looks[-1]["watch"]["sgp"] > LEVEL and looks[0]["watch"]["sgp"] < LEVEL
    assert all(line["land"] == LEVEL for line in looks)
    assert json.loads((landed / "summary.json").read_text())["steps"] == last
    assert read_run("run", landed).status == "finished"
    assert (landed / "weights" / "config.json").is_file()
    assert (landed / "checkpoints" / f"step_{last:05d}").is_dir()


@pytest.mark.parametrize("last, before, gap, share", [
    (1.0, -0.2, 0.0, 1.0),     # as much is left as the gap rose by, and more
    (1.0, 0.0, 0.2, 0.25),     # a quarter of it is left
    (0.25, 0.2, 0.24, 0.1),    # a quarter again, but not less than a tenth
    (0.2, 0.20, 0.21, 0.8),    # it rose slowly, so faster again
    (0.5, 0.1, 0.1, 0.5), (0.5, 0.1, 0.0, 0.5)])  # it did not rise
def test_the_learning_rate_falls_so_that_the_next_look_is_at_the_level(last, before, gap, share):
    assert slower(last, before, gap, level=0.25) == pytest.approx(share)


def test_the_gap_is_sure_by_its_standard_error():
    assert sure(torch.tensor([0.1, 0.3])) == pytest.approx((0.1, 0.1))
    assert sure(torch.tensor([0.2])) == pytest.approx((0.2, 0.0))


def test_the_last_updates_are_smaller(landed):
    rates = [line["lr"] for line in log_of(landed)]
    assert rates[0] == 1e-4 and 1e-5 <= rates[-1] < 1e-4 and rates == sorted(rates, reverse=True)


def test_it_goes_on_only_to_a_higher_level(landed, capsys):
    before = log_of(landed)
    run(landed, "--resume")
    assert log_of(landed) == before
    run(landed, "--resume", "--land", "off", "--steps", len(before) + 1)
    assert log_of(landed)[:-1] == before and log_of(landed)[-1]["lr"] == 1e-4
    run(landed, "--resume", "--land", 0.9, "--steps", len(before) + 2)
    assert len(log_of(landed)) == len(before) + 2
    assert f"not landed: after {len(before) + 2} updates" in capsys.readouterr().out


def test_the_level_of_a_folder_is_the_mean_gap_of_its_photographs_through_the_vae(tmp_path):
    folder = make_photographs(tmp_path / "six")
    model = Model("miniature")
    net = flow.load(model)
    reward = rewards.load_rewards("miniature/reward")
    a = SimpleNamespace(land=str(folder), size=64, control=["realistic photo"], neg=["CG render"])
    shown = landing.references(a, model, parallel.World())
    found = landing.level(a, model, shown, net, reward, parallel.World())
    part, _ = reward.trained[0]
    gaps = []
    for photograph in shown:
        image = landing.photographs.pixels(photograph, model.unit)
        with torch.no_grad():
            f = part.image_features(net.decode(net.encode(image), photograph.grid))
        _, C1, C2 = part.conditions([photograph.caption], *a.control, *a.neg)
        gaps.append(sr.preference(f, C1 - C2))
    assert len(gaps) == 6 and found == pytest.approx(torch.cat(gaps).mean().item(), abs=1e-5)


def test_two_photographs_have_a_standard_error_and_one_has_none(tmp_path, capsys):
    folder = make_photographs(tmp_path / "six")
    for i in range(2, 6):
        (folder / f"{i}.png").unlink()
    model = Model("miniature")
    world = parallel.World()
    a = SimpleNamespace(land=str(folder), size=64, control=["realistic photo"], neg=["CG render"])
    shown = landing.references(a, model, world)
    landing.level(a, model, shown, flow.load(model), rewards.load_rewards("miniature/reward"), world)
    said = capsys.readouterr().out
    assert re.search(r"2 photographs have a mean SGP gap of [+-]0\.\d+ ± 0\.\d+ \(standard error\)", said), said
    assert "16 photographs or more would make it surer" in said
    (folder / "1.png").unlink()
    with pytest.raises(UserError, match="one photograph has no standard error; give 2 or more"):
        landing.references(a, model, world)


@pytest.mark.parametrize("land", [None, 0.2])
def test_a_number_is_the_level(land):
    a = SimpleNamespace(land=land)
    assert landing.references(a, None, None) == [] and landing.level(a, None, [], None, None, None) == land


def test_many_photographs_are_thinned_evenly(monkeypatch):
    monkeypatch.setattr(landing.photographs, "read", lambda *_: list(range(1000)))
    model = SimpleNamespace(unit=16)
    found = landing.references(SimpleNamespace(land="folder", size=64), model, parallel.World())
    assert len(found) == landing.MOST and found[0] == 0 and found[-1] > 990 and len(set(found)) == len(found)


def test_a_run_that_begins_beyond_the_level_is_refused(tmp_path):
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "run", "--steps", 2, "--land", -0.9)
    assert stopped.value.code == 2
