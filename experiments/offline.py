"""S5: does SRPO learn from photographs as it learns from its own pictures? And what does supervised
fine-tuning learn from the same ones, in as many updates?

    python -m experiments.offline

The photographs are drawn: scenes of the miniature's world in their photographic look, with captions that say
nothing of it, and none of them a held-out prompt. Every arm begins with the same model and makes the same
number of updates, but for one that says another; all are judged on the same held-out prompts and noise.

"Noisier" trains where a photograph is hardly seen any more (sigma from 0.99 to 0.9 in place of 0.964 to
0.75): so the network meets there what it meets when it samples. Supervised is one step of flow matching an
update, |v - (eps - x0)|^2, at the noise levels of the sampler, with the learning rate of SRPO and with larger
ones.
"""

import hashlib
import shlex
import sys
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
from engine.command_line import whole
from engine.errors import UserError, frame
from engine.files import read_json, write_json
from experiments import bench, runs
from miniature import world as drawn

LOOK = "realistic photo"  # of the miniature's world
FASTER = (1, 4, 16)  # learning rates of supervised fine-tuning, in those of SRPO
COLUMNS = {"realism": ("realism", ".1%"), "alignment": ("alignment", ".1%"), "broken": ("broken", ".1%"),
           "frechet": ("Frechet", ".1f"), "redness": ("redness", "+.3f"), "sgp": ("SGP", "+.3f"),
           "painting": ("painting", ".1%"), "gflop": ("GFLOP an update", ".2f")}


class Arm(NamedTuple):
    """A way to train: flags of train.py, and how an update is made."""
    name: str
    flags: list
    update: Callable  # of the flags, the `prepare.Run` and the step


# -------------------------------------------------------------------------------------------- the photographs
def draw(folder, number, held_out):
    """Fill a folder with so many photographs of the world, each with its caption beside it; none of them is
    of a held-out prompt. What is there already is drawn again."""
    folder.mkdir(parents=True, exist_ok=True)
    images, scenes = drawn.draw(drawn.sample_style, 2 * number, 0, LOOK)
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


def evaluated(arm, own, shared, seed, world):
    """{"before", "after"} training an arm: each {column: mean over the held-out pictures}. Made once, and
    kept in --home. Raises UserError for a model that has no judge."""
    argv = [*shared, *arm.flags, "--eval", str(own.pictures), "--seed", str(seed)]
    digest = hashlib.sha256(shlex.join([arm.update.__name__, *argv]).encode()).hexdigest()[:8]
    kept = Path(own.home) / f"offline_{digest}.json"
    if not kept.exists():
        print(f"{arm.name}, seed {seed}: {shlex.join(argv)}", flush=True)
        write_json(kept, trained(arm, train.flags(argv), world))
    return read_json(kept)


def trained(arm, a, world):
    """Train an arm: what `evaluated` says of it."""
    prepare.settle(a, world)
    run = prepare.set_up(a, world)
    if run.watched.judge is None:
        raise UserError(f"--model {a.model}: it has no judge, and nothing else knows what a photo is")
    before = run.watched.evaluate("evaluate before")
    for step in range(1, a.steps + 1):
        arm.update(a, run, step)
    after = run.watched.evaluate("evaluate after")
    return {"before": means(before), "after": means(after)}


def means(row):
    """{column: number} of a row of train.py's table."""
    return {column: cell["mean"] for column, cell in row.items() if cell}


def flop_of(arm, shared):
    """FLOP of the transformer in one update."""
    job = prepare.job(train.flags([*shared, *arm.flags]))
    return plan.update_flop(replace(job, calls=1) if arm.update is supervised else job)


def main(argv=None):
    with frame("offline"):
        parser = runs.parser(__doc__, seeds=3, pictures=256)
        parser.add_argument("--photos", type=whole(1), default=1000, help="photographs that are drawn")
        own = parser.parse_args(sys.argv[1:] if argv is None else argv)
        shared = ["--model", own.model, *shlex.split(own.flags)]
        a = train.flags(shared)
        world = parallel.World()
        folder = Path(own.home) / f"photographs_{own.photos}"
        draw(folder, own.photos, set(data.read_prompts(a.eval_prompts)))
        rows = {}
        for arm in arms(a, folder):
            found = [evaluated(arm, own, shared, seed, world) for seed in range(own.seeds)]
            rows["base"] = runs.over_seeds([found[0]["before"]])
            rows[arm.name] = runs.over_seeds([each["after"] for each in found])
            rows[arm.name]["gflop"] = runs.spread([flop_of(arm, shared) / 1e9])
        figure = runs.bar_figure(rows, ("realism", "alignment", "broken"), runs.what_n_is(own))
        told = (f"{own.photos} photographs; {a.steps} updates of {a.batch * a.accumulate} images, lr "
                f"{a.lr:g}; {own.pictures} held-out prompts, {own.seeds} seeds, mean ± standard deviation "
                "between them.")
        runs.write(own, "offline", "Photographs in place of rollouts (S5)", told, [(rows, COLUMNS)], figure)
        world.close()


if __name__ == "__main__":
    main()
