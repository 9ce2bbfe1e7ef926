"""Claims about --land: a run ends where its watched pictures score the SGP gap of photographs."""

import json
from types import SimpleNamespace

import pytest
import torch
from builders import make_photographs

import flow
import rewards
import srpo_reward as sr
import train
from engine.memory import parallel
from engine.model.folder import Model
from evaluation import landing
from evaluation.report.curves import read_log
from evaluation.report.page import read_run

SMALL = ["--model", "miniature", "--recipe", "fast", "--global-batch", "8", "--lr", "1e-4", "--eval-steps", "4",
         "--watch", "8", "--watch-every", "2", "--eval", "0"]


def run(out, *argv):
    train.main([*SMALL, "--out", str(out), *map(str, argv)])


def log_of(out):
    return read_log(out / "log.jsonl")


@pytest.fixture(scope="module")
def landed(tmp_path_factory):
    """A run that may make 20 updates, and lands before."""
    out = tmp_path_factory.mktemp("landing") / "run"
    run(out, "--steps", 20, "--land", -0.1)
    return out


def test_a_run_ends_at_the_first_look_that_has_reached_the_level(landed):
    log = log_of(landed)
    looks = {line["step"]: line["watch"]["sgp"] for line in log if "watch" in line}
    last = max(looks)
    assert log[-1]["step"] == last < 20
    assert looks[last] >= -0.1 and all(gap < -0.1 for step, gap in looks.items() if step < last)
    assert all(line["land"] == -0.1 for line in log if "watch" in line)
    assert json.loads((landed / "summary.json").read_text())["steps"] == last
    assert read_run("run", landed).status == "finished"
    assert (landed / "weights" / "config.json").is_file()
    assert (landed / "checkpoints" / f"step_{last:05d}").is_dir()


def test_it_goes_on_only_to_a_higher_level(landed, capsys):
    before = log_of(landed)
    run(landed, "--resume")
    assert log_of(landed) == before
    run(landed, "--resume", "--land", "off", "--steps", len(before) + 1)
    assert log_of(landed)[:-1] == before
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


def test_one_photograph_is_enough(tmp_path, capsys):
    folder = make_photographs(tmp_path / "six")
    model = Model("miniature")
    world = parallel.World()
    a = SimpleNamespace(land=str(folder), size=64, control=["realistic photo"], neg=["CG render"])
    first = landing.references(a, model, world)[:1]
    landing.level(a, model, first, flow.load(model), rewards.load_rewards("miniature/reward"), world)
    assert "standard deviation of 0.000" in capsys.readouterr().out


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
