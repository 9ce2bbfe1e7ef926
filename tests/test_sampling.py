"""Claims about --memory of sample.py and evaluate.py (engine/memory/sampling.py): a card shows what it has trained."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from scripts import call

import flow
import sample
from engine.data.pictures import read_picture
from engine.errors import UserError
from engine.memory import cards, modes, parallel, sampling
from engine.model import lora, trained
from engine.model.folder import Model
from rewards.pictures import pixels

GIB = 2**30
ASKED = ["--model", "miniature", "--eval-steps", "2", "a red circle", "a blue square"]


@pytest.fixture(scope="module")
def predicted():
    """What sampling FLUX.1-dev takes, at 1024 x 1024."""
    job = sampling.job(Model("black-forest-labs/FLUX.1-dev"), 1024, 1)
    return job, sampling.predictions(job)


def settled(monkeypatch, predicted, name, gib, host=64):
    job, found = predicted
    monkeypatch.setattr(sampling, "predictions", lambda _: found)
    monkeypatch.setattr(sampling, "this_machine", lambda _: cards.Machine(gib * GIB, host * GIB))
    return sampling.settle(job, name, SimpleNamespace(device=torch.device("cuda")))


@pytest.mark.parametrize("gib, name", [(139.8, "bf16"), (44.4, "bf16"), (23.6, "fp8"), (15.7, "fp8"),
                                       (11.6, "fp8-offload")])
def test_every_card_of_the_table_can_sample(monkeypatch, predicted, gib, name):
    chosen, why = settled(monkeypatch, predicted, "auto", gib)
    assert chosen == name and why.startswith(f"--memory {name}: predicted ") and "\n" not in why


@pytest.mark.parametrize("name, gib, host, words", [
    ("auto", 8, 64, "sampling with --memory auto: predicted peak 10.3 GiB .* what helps: a smaller --size$"),
    ("bf16", 23.6, 64, "--memory bf16: predicted peak .* what helps: --memory fp8, or --memory fp8-offload$"),
    ("fp8-offload", 23.6, 4, "GiB a GPU and 17 of the host; free are 23.6 and 4; what helps: --memory fp8$")])
def test_what_does_not_fit_is_one_line(monkeypatch, predicted, name, gib, host, words):
    with pytest.raises(UserError, match=words) as error:
        settled(monkeypatch, predicted, name, gib, host)
    assert "\n" not in str(error.value)


def pictures(folder, *argv):
    """The two pictures that sample.py makes: [2, 3, 64, 64]."""
    sample.run([*ASKED, "--out", str(folder), *argv], SimpleNamespace(check=lambda: None))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return torch.stack([pixels(read_picture(folder / f"0000{i}.png")) for i in range(2)])


@pytest.fixture
def a_lora(tmp_path):
    """A LoRA's folder, whose pictures differ from the base's."""
    transformer = flow.load(Model("miniature")).transformer
    lora.add_adapters(transformer, 4)
    lora.start(transformer, 0)
    for parameter in lora.adapters(transformer).values():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    lora.export(transformer, tmp_path / "lora", SimpleNamespace(main=True))
    return str(tmp_path / "lora")


def test_pictures_in_float8_are_nearly_those_of_the_plain_path(tmp_path, a_lora):
    """Of the base, and of a LoRA, which stays beside the float8 weights; on the host the same to the bit."""
    for weights in ([], ["--weights", a_lora]):
        where = tmp_path / str(len(weights))
        plain, fp8, offload = (pictures(where / name, "--memory", name, *weights) for name in modes.LORA)
        assert torch.equal(fp8, offload)
        assert 0 < (plain - fp8).abs().mean() < 0.01
    assert trained.rank_of(a_lora, Model("miniature")) == 4 and trained.rank_of(None, Model("miniature")) is None
    base, changed = (pictures(tmp_path / where / "fp8", "--memory", "fp8", *weights)
                     for where, weights in (("0", []), ("2", ["--weights", a_lora])))
    assert (base - changed).abs().mean() > 0.02


def test_pictures_of_two_precisions_do_not_mix(tmp_path):
    pictures(tmp_path, "--memory", "fp8")
    with pytest.raises(UserError, match="is there, and not from sample.py with these flags"):
        pictures(tmp_path, "--memory", "bf16")
    pictures(tmp_path, "--memory", "fp8-offload")  # on the host or not is the same


@pytest.mark.slow
def test_processes_evaluate_each_with_its_own_float8_weights(tmp_path):
    """Three pictures of two processes: they do not wait for each other, and the result is one process's."""
    asked = ["evaluate.py", "--model", "miniature", "--eval-steps", "1", "--first", "3", "--metrics", "look",
             "--memory", "fp8", "--out"]
    call(tmp_path / "printed", *asked, tmp_path / "two", ranks=2)
    call(tmp_path / "printed", *asked, tmp_path / "one")
    one, two = (json.loads((tmp_path / name / "results.json").read_text())["rows"] for name in ("one", "two"))
    assert one == two


def test_one_process_has_a_mesh_of_its_own():
    world = parallel.World(mesh=True)
    assert world.alone().mesh.size() == 1 and world.alone().size == 1
    world.close()


def test_on_a_cpu_nothing_is_counted(monkeypatch):
    monkeypatch.setattr(sampling, "predictions", lambda job: sys.exit("counted"))
    for name, chosen in (("auto", "bf16"), ("fp8", "fp8")):
        assert sampling.settle(None, name, parallel.World()) == (chosen, None)
