"""Claims about train.py with --lora and --memory: every path trains the miniature end to end as the plain one
does, on one process and on two, is killed and goes on, and leaves what users load."""

import json
import random
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scripts import call, start

import command
import prepare
import recipe
import train
from engine.memory import modes, parallel
from engine.model import lora
from engine.run import folder as run_folder

SMALL = ["train.py", "--model", "miniature", "--rollout-steps", "2", "--eval-steps", "2", "--watch", "2",
         "--eval", "0"]
RECIPE = json.loads(Path("miniature/srpo.json").read_text())
OF_FULL = [["--memory", name] for name in modes.FULL[1:]]
OF_LORA = [["--lora", "4", "--memory", name] for name in modes.LORA]


def trained(out):
    """What a run has trained: full weights, or a LoRA."""
    names = (lora.FILE, "diffusion_pytorch_model.safetensors")
    file, = [out / "weights" / name for name in names if (out / "weights" / name).exists()]
    return load_file(file)


def farthest(a, b, rounding=0.0):
    """The largest difference of any two numbers, beyond a rounding of them."""
    assert a.keys() == b.keys()
    return max(((a[name] - b[name]).abs() - rounding * b[name].abs()).max().item() for name in a)


@pytest.mark.slow
@pytest.mark.parametrize("flags", OF_FULL + OF_LORA, ids=" ".join)
def test_every_path_trains_as_the_plain_one(tmp_path, flags):
    """Three updates with every --memory, by one process and by two, against float32 masters or a LoRA on a
    float32 base in one. A float8 base makes another gradient, to 0.998 of a cosine (test_memory.py), and Adam
    turns the sign of the smallest; what split writes is the upper half of its masters, in bf16."""
    printed = tmp_path / "printed"
    common = [*SMALL, "--steps", "3"]
    plain = [] if flags[0] == "--memory" else flags[:2]
    call(printed, *common, "--global-batch", 2, "--out", tmp_path / "plain", *plain)
    call(printed, *common, "--global-batch", 2, "--out", tmp_path / "one", *flags)
    call(printed, *common, "--global-batch", 2, "--out", tmp_path / "two", *flags, ranks=2)
    for out in ("one", "two"):
        rounding = 2**-8 if flags[-1] == "split" else 0
        off = farthest(trained(tmp_path / out), trained(tmp_path / "plain"), rounding)
        step = RECIPE["lora_lr" if "--lora" in flags else "lr"]
        assert off < (6.5 * step if "fp8" in flags[-1] or flags[-1] == "split" else 0.1 * step), out


@pytest.mark.slow
@pytest.mark.parametrize("flags, ranks", [(["--lora", "4", "--memory", "fp8"], 2),
                                          (["--memory", "offload"], 0)], ids=str)
def test_killed_it_goes_on_to_the_same_end(tmp_path, flags, ranks):
    """kill -9 of every process, some time after the first checkpoint; bit-identical with a run that nobody
    killed."""
    printed = tmp_path / "printed"
    common = [*SMALL, "--global-batch", "2", "--steps", "3", "--save-every", "1", *flags]
    call(printed, *common, "--out", tmp_path / "whole", ranks=ranks)
    processes = start(printed, *common, "--out", tmp_path / "killed", ranks=ranks)
    while not run_folder.finished(tmp_path / "killed"):
        assert all(process.is_alive() for process in processes)
        time.sleep(0.02)
    time.sleep(0.2 * random.random())
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
    call(printed, *common, "--out", tmp_path / "killed", "--resume", ranks=ranks)
    for name, tensor in trained(tmp_path / "whole").items():
        assert torch.equal(trained(tmp_path / "killed")[name], tensor)
    assert (tmp_path / "killed" / "weights_best").is_dir()


def test_a_small_card_saves_on_the_reward_path():
    """With a float8 base: every text that the run asks for is encoded before it begins, the text side has
    left the device, the decoder is recomputed; an update's loss is the plain path's."""
    losses = []
    for layout in ("bf16", "fp8"):
        argv = [*SMALL[1:], "--lora", "4", "--memory", layout, "--global-batch", "2", "--steps", "2"]
        a, model = command.read(argv)
        world = parallel.World(mesh=modes.needs_mesh(layout))
        run = prepare.set_up(a, model, world)
        known = set(run.reward.trained[0][0].cache)
        terms = list(train.srpo(a, run.net, run.reward, run.batch(a, 2, 0)))
        losses.append(torch.stack([loss for loss, _ in terms]).detach())
        run.watched.look(run.watched.watched, "held out")
        after = set(run.reward.trained[0][0].cache)
        assert (after == known) == (layout == "fp8")
        assert run.net.vae.decoder.gradient_checkpointing == (layout == "fp8")
        world.close()
    assert torch.allclose(*losses, atol=5e-3)


@pytest.mark.parametrize("flags, rate", [((), RECIPE["lr"]), (("--lora", "16"), RECIPE["lora_lr"]),
                                         (("--lora", "16", "--lr", "1e-3"), 1e-3)])
def test_a_lora_has_a_learning_rate_of_its_own(flags, rate):
    """The miniature's, from its srpo.json; for a model that does not say, a guess; a flag goes before."""
    assert command.flags(["--model", "miniature", *flags]).lr == rate
    assert command.flags(["--lora", "8"]).lr == recipe.LORA_LR
    assert command.flags([]).lr == 5e-6
