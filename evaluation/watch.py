"""Watching a run: held-out prompts sampled at fixed seeds, their scores, and a gauge that says when the
reward is being hacked."""

from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torchvision.io import encode_png, read_image
from tqdm import tqdm

import flux
import srpo_reward as sr
from engine.errors import NotFinite
from engine.files import write_json, write_whole
from engine.model import lora
from evaluation import tables
from evaluation.metrics import frechet, judge, reward, statistics
from evaluation.metrics.statistics import STATISTICS, pixel_statistics
from evaluation.picture_folders import save_grid
from evaluation.report import page as report
from rewards.base import Column


@torch.no_grad()
def measure(images, prompts, rewards, judging, control, neg, batch=64):
    """Every score of P pictures [P, 3, H, W] in [0, 1] for their P prompts: a dict of [P] float tensors.

    reward  Eq. 7, f.C0 of the bare prompt;  sgp  Eq. 10, f.(C1 - C2): of the `Rewards` as they are trained on
    and, where there are several or one is held out, of each one;  the pixel statistics;  the judge's
    verdicts, where the model has a judge (else None).
    """
    parts = []
    for i in range(0, len(images), batch):
        x = images[i:i + batch]
        texts = prompts[i:i + batch]
        scores = {"reward": 0, "sgp": 0}
        for label, (model, weight) in rewards.parts.items():
            f = model.image_features(x.to(model.device))
            C0, C1, C2 = model.conditions(texts, control, neg)
            each = {"reward": sr.preference(f, C0), "sgp": sr.relative(f, C1, C2)}
            for name, r in each.items():
                scores[name] = scores[name] + weight * r
                if len(rewards.parts) > 1:
                    scores[f"{name} {label}"] = r
        scores |= pixel_statistics(x)
        if judging is not None:
            scores |= judging.verdicts(x, texts)
        parts.append(scores)
    return {name: torch.cat([part[name].float().cpu() for part in parts]) for name in parts[0]}


def columns_of(scores):
    """{name: `Column`} of what `Watch.evaluate` gives; a reward among several has a column of its own."""
    known = reward.COLUMNS | statistics.COLUMNS | judge.COLUMNS | frechet.SET_COLUMNS
    return {name: known.get(name, Column(name, "+.3f")) for name in scores}


class Gauge(NamedTuple):
    """What the watched pictures say: drift {statistic: change of the mean}, and what is wrong, in words."""
    drift: dict
    warnings: list


def hacking(now, before, band):
    """The hacking `Gauge`: now and before are scores {name: [P]} of the same prompts and seeds, band the
    largest |drift| of each of STATISTICS.

    A rise or fall of the reward or the SGP gap counts when it is above two standard errors of the paired
    differences; of one picture there is no standard error, and neither counts.
    """
    drift = {name: (now[name] - before[name]).mean().item() for name in STATISTICS}
    warnings = []
    for name, limit in zip(STATISTICS, band, strict=True):
        if abs(drift[name]) > limit:
            warnings.append(f"{name} drifted by {drift[name]:+.3f}, outside ±{limit}")
    change = {name: now[name] - before[name] for name in ("reward", "sgp")}
    if len(change["sgp"]) > 1:
        sure = all(d.mean().abs() > 2 * d.std() / len(d) ** 0.5 for d in change.values())
        if sure and change["reward"].mean() > 0 > change["sgp"].mean():
            warnings.append("the reward rises while the SGP gap falls")
    return Gauge(drift, warnings)


class Prompts(NamedTuple):
    """P prompts, as texts and as the network reads them."""
    texts: list
    embeddings: flux.Embeddings


class Watch:
    """Held-out prompts of a run: their pictures, at noise seeds 0, 1, ..., and the pictures' scores."""

    def __init__(self, a, model, world, net, rewards, watched, evaluated, stopping):
        """a: the run's flags; model: a `Model`, whose folder may hold a judge; rewards: `srpo_reward.Rewards`;
        watched, evaluated: the `Prompts` that are looked at while it trains, and those before and after; stopping:
        a `Stopping`, asked between two batches, or None."""
        self.a = a
        self.world = world
        self.net = net
        self.rewards = rewards
        self.judge = judge.load_judge(model.name, a.size)
        self.watched = watched
        self.evaluated = evaluated
        self.stopping = stopping
        self.flags = ""  # the run's, as one line for its report: train.py gives it
        self.grid = net.grid(a.size, a.size)

    def look(self, prompts, title):
        """Pictures [n, 3, H, W] of n `Prompts`, and their scores {name: [n]}. The processes share the work,
        and all get the whole."""
        n = len(prompts.texts)
        each = -(-n // self.world.size)
        rows = [min(i, n - 1) for i in range(each * self.world.size)][self.world.rows(each)]
        images = flux.sample(self.net, prompts.embeddings.txt[rows], prompts.embeddings.pooled[rows],
                             flux.noise(self.net, self.grid, rows), self.grid, self.a.eval_steps,
                             self.a.guidance, self.a.batch, partial(self.batches, title))
        texts = [prompts.texts[row] for row in rows]
        scores = measure(images, texts, self.rewards, self.judge, self.a.control[0], self.a.neg[0])
        everyones = self.world.gather((images, scores))
        images = torch.cat([images for images, _ in everyones])[:n]
        scores = {name: torch.cat([scores[name] for _, scores in everyones])[:n] for name in scores}
        for name, values in scores.items():
            if name not in judge.UNDEFINED and not values.isfinite().all():
                raise NotFinite(f"{title}: {name} of the held-out pictures is not finite")
        return images, scores

    def batches(self, title, batches):
        """The batches of a look, with a progress bar if they are many. Raises Stopped between two of them."""
        for batch in tqdm(batches, title, leave=False, disable=len(batches) < 5 or not self.world.main):
            if self.stopping is not None:
                self.stopping.check(self.world)
            yield batch

    def evaluate(self, title):
        """The table's row of the first --eval prompts, {column: `tables.mean`}; None without any."""
        if not self.a.eval:
            return None
        images, scores = self.look(self.evaluated, title)
        return self.summary(images, scores, self.evaluated)

    def summary(self, images, scores, prompts):
        """What a look at some `Prompts` comes to: {column: `tables.mean`}, and of the miniature's pictures
        what is said of them as a set."""
        of_all = {} if self.judge is None else frechet.of_pictures(images, prompts.texts)
        return tables.summary(scores) | of_all

    def begin(self, folder):
        """The first look, at the base model, or at --weights: what the run remembers from now on, its
        state."""
        if self.a.watch == 1:
            self.world.say("--watch 1: one picture has no standard error, so the gauge cannot see the reward "
                           "rise while the SGP gap falls")
        # A LoRA that is gone on with is a part of what the run starts from; new adapters are none.
        with nullcontext() if self.a.weights else lora.adapter_off(self.net.transformer):
            images, scores = self.look(self.watched, "watch")
            evaluated = self.evaluate("evaluate before")
        if self.world.main:
            save_grid(images, folder.out / "samples" / "step_00000.png")
        return {"run": folder.id, "images": self.a.global_batch, "step": 0, "unlogged": None,
                "best": None, "best_step": None, "warned": False,
                "before": {name: values.tolist() for name, values in scores.items()},
                "evaluated": evaluated}

    def log(self, folder, state):
        """Look at the held-out prompts, if this step is one of --watch-every, and log the step, whose line
        stands in the state. If it is asked to stop meanwhile, the line stays there, and --resume does the
        rest."""
        line = state["unlogged"]
        if line["step"] % self.a.watch_every == 0 or line["step"] == self.a.steps:
            line |= self.step(line["step"], folder, state)
        if self.world.main:
            folder.log(line)
            if "watch" in line:
                self.report(folder, state)
        state["unlogged"] = None

    def report(self, folder, state, finished=False, stopped=False):
        """Write report.html, the run's page."""
        report.write(folder.out, vars(self.a), self.flags, finished, state, self.watched.texts,
                     stopped)

    def step(self, step, folder, state):
        """Look, read the hacking gauge, and export the weights if they are the best so far by the SGP gap;
        returns what to log."""
        images, now = self.look(self.watched, "watch")
        before = {name: torch.tensor(values) for name, values in state["before"].items()}
        gauge = hacking(now, before, self.a.drift_band)
        for warning in gauge.warnings:
            self.world.say(f"step {step}: {warning}")
        if gauge.warnings and not state["warned"]:
            self.world.say(report.advice(gauge.warnings, state, vars(self.a)))
        state["warned"] = bool(gauge.warnings)
        sgp = now["sgp"].mean().item()
        if not gauge.warnings and (state["best"] is None or sgp > state["best"]):
            lora.export(self.net.transformer, folder.out / "weights_best", self.world, self.net.dtype)
            state |= {"best": sgp, "best_step": step}
        if self.world.main:
            save_grid(images, folder.out / "samples" / f"step_{step:05d}.png")
        means = {name: value and value["mean"]
                 for name, value in self.summary(images, now, self.watched).items()}
        return {"drift": gauge.drift, "watch": means, "hacking": gauge.warnings}

    def finish(self, folder, state):
        """The evaluation after, and the first and the last watched pictures above one another."""
        after = self.evaluate("evaluate after")
        if not self.world.main:
            return
        out = folder.out
        samples = [out / "samples" / f"step_{step:05d}.png" for step in (0, state["step"])]
        if all(path.is_file() for path in samples):
            pictures = [read_image(str(path)) for path in samples]
            write_whole(out / "before_after.png", bytes(encode_png(torch.cat(pictures, 1)).numpy()))
        write_json(out / "summary.json", {"steps": self.a.steps, "best_sgp": state["best"],
                                          "before": state["evaluated"], "after": after})
        self.report(folder, state, finished=True)
        if after is not None:
            print(tables.table({"before": state["evaluated"], "after": after}, columns_of(after)))
        print(f"weights in {out}/weights (best by SGP gap inside the drift band: weights_best), "
              f"pictures in {out}/before_after.png")
