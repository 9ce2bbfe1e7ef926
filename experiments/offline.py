"""Does SRPO learn from photographs as it learns from its own pictures? And what does supervised fine-tuning
learn from the same ones, in as many updates?

    python -m experiments.offline --model miniature

The photographs are drawn: scenes of the miniature's world in their photographic look, with captions that say
nothing of it, and none of them a held-out prompt. Every arm begins with the same model and makes the same
number of updates, but for one that says another; all are judged on the same held-out prompts and noise.

"Noisier" trains where a photograph is hardly seen any more (sigma from 0.99 to 0.9 in place of 0.964 to
0.75): so the network meets there what it meets when it samples. Supervised is one step of flow matching an
update, |v - (eps - x0)|^2, at the noise levels of the sampler, with the learning rate of SRPO and with larger
ones. All flags of train.py work.
"""

import shlex
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torchvision.transforms.functional import to_pil_image

import direct_align as da
import prepare
import train
from engine import data, memory, parallel, plan
from engine.command_line import Parser, some_path, whole
from engine.errors import UserError, frame
from engine.files import write_json, write_whole
from evaluation import tables, watch
from experiments import bench
from miniature import world as drawn

LOOK = "realistic photo"  # of the miniature's world
FASTER = (1, 4, 16)  # learning rates of supervised fine-tuning, in those of SRPO


class Arm(NamedTuple):
    """A way to train: flags of train.py, and how an update is made."""
    name: str
    flags: list
    update: Callable  # of the flags, the `prepare.Run` and the step


def flags(argv):
    """This script's own flags, and those of train.py that are for every arm. Raises UserError."""
    parser = Parser(__doc__)
    parser.add_argument("--photos", type=whole(1), default=1000, help="photographs that are drawn")
    parser.add_argument("--pictures", type=whole(8), default=256, help="held-out pictures that are judged")
    parser.add_argument("--results", type=some_path, default="experiments/results",
                        help="folder of offline.md and offline.json")
    return parser.parse_known_args(argv)


# -------------------------------------------------------------------------------------------- the photographs
def draw(folder, number, held_out, seed):
    """Fill a folder with so many photographs of the world, each with its caption beside it; none of them is
    of a held-out prompt."""
    images, scenes = drawn.draw(drawn.sample_style, 2 * number, seed, LOOK)
    captions = [caption.removeprefix(f"{LOOK}. ") for caption in drawn.captions(scenes)]
    allowed = [i for i, caption in enumerate(captions) if caption not in held_out]
    for i in allowed[:number]:
        to_pil_image(images[i]).save(folder / f"{i:05d}.png")
        (folder / f"{i:05d}.txt").write_text(captions[i] + "\n")


# ------------------------------------------------------------------------------------------------ the updates
def srpo(a, run, step):
    """An update as train.py makes it."""
    bench.one_update(a, run, [], step)


def supervised(a, run, step):
    """An update of flow matching on the batches that SRPO would have had, with the same noise."""
    levels = torch.Generator().manual_seed(step)
    for part in range(a.accumulate):
        batch = run.batch(a, step, part)
        u = torch.rand(len(batch.prompts), generator=levels)
        sigma = da.shift(u, a.shift or run.net.shift(batch.x0.shape[1])).to(batch.x0.device)  # [B]
        v = run.net.velocity(da.inject(batch.x0, batch.eps, sigma), sigma, batch.c, a.guidance)
        loss = (v - (batch.eps - batch.x0)).square().mean()
        (loss / a.accumulate).backward()
    torch.nn.utils.clip_grad_norm_(memory.trainable(run.net.transformer), a.clip)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)


# --------------------------------------------------------------------------------------------------- the arms
def arms(a, folder):
    """All ways to train; `a` are the flags that they share."""
    offline = ["--images", str(folder)]
    noisier = [*offline, "--sigma-range", "0.99", "0.9"]
    longer = a.steps + a.steps // 6
    found = [Arm("SRPO online", [], srpo), Arm("SRPO offline", offline, srpo),
             Arm("SRPO offline, noisier", noisier, srpo),
             Arm(f"SRPO offline, noisier, {longer} updates", [*noisier, "--steps", str(longer)], srpo)]
    for faster in FASTER:
        name = "supervised" if faster == 1 else f"supervised, {faster} x lr"
        found.append(Arm(name, [*offline, "--lr", str(faster * a.lr)], supervised))
    return found


def look(run, name):
    """The scores {name: [P]} of the held-out pictures."""
    _, scores = run.watched.look(run.watched.evaluated, name)
    return scores


def trained(arm, own, others, world):
    """Train an arm: its scores before and after."""
    a = train.flags([*others, *arm.flags, "--eval", str(own.pictures)])
    prepare.settle(a, world)
    run = prepare.set_up(a, world)
    if run.watched.judge is None:
        raise UserError(f"--model {a.model}: it has no judge, and nothing else knows what a photo is")
    before = look(run, arm.name)
    for step in range(1, a.steps + 1):
        arm.update(a, run, step)
    return before, look(run, arm.name)


def flop_of(arm, others):
    """FLOP of the transformer in one update."""
    job = prepare.job(train.flags([*others, *arm.flags]))
    return plan.update_flop(replace(job, calls=1) if arm.update is supervised else job)


def report(a, own, rows, columns, flop):
    """Print the table, and write it to --results with the command that made it."""
    table = tables.table(rows, columns)
    print(f"\n{table}")
    command = shlex.join(["python", "-m", "experiments.offline", *sys.argv[1:]])
    text = [f"# Offline: SRPO and supervised fine-tuning on {own.photos} photographs", "",
            "```", command, "```", "",
            f"{a.steps} updates of {a.batch * a.accumulate} images, lr {a.lr}, seed {a.seed}; {own.pictures} "
            "held-out prompts, mean ± standard error over the pictures:", "",
            table, "",
            "| an update | GFLOP of the transformer |", "|---|---|"]
    text += [f"| {name} | {each / 1e9:.2f} |" for name, each in flop.items()]
    folder = Path(own.results)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "offline.md", "\n".join(text) + "\n")
    write_json(folder / "offline.json", {"command": command, "rows": rows, "flop": flop})


def main():
    with frame("offline"):
        own, others = flags(sys.argv[1:])
        others += ["--watch", str(own.pictures)]
        a = train.flags(others)
        world = parallel.World()
        held_out = set(data.read_prompts(a.eval_prompts))
        rows = {}
        flop = {}
        with tempfile.TemporaryDirectory() as folder:
            draw(Path(folder), own.photos, held_out, a.seed)
            for arm in arms(a, folder):
                before, after = trained(arm, own, others, world)
                flop[arm.name] = flop_of(arm, others)
                rows["base"] = tables.summary(before)
                rows[arm.name] = tables.summary(after)
        report(a, own, rows, watch.columns_of(after), flop)
        world.close()


if __name__ == "__main__":
    main()
