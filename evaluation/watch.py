"""Watching a run.

The watched pictures are those of held-out prompts. They are sampled at fixed noise seeds every --watch-every updates,
which is called a look, and scored. The scores are compared with those before training. The drift warning says when the
reward is probably being hacked.
"""

from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
from tqdm import tqdm

import flow
import srpo_reward as sr
from engine.data.pictures import read_picture
from engine.errors import NotFinite, UserError, printable
from engine.files import write_json
from engine.model import lora
from engine.run.folder import PHOTOGRAPHS
from evaluation import card, sheets, table_formats, tables
from evaluation.metrics import frechet, judge
from evaluation.metrics.statistics import STATISTICS
from evaluation.picture_folders import places, save_grid
from evaluation.report import curves
from evaluation.report import page as report
from rewards.pictures import fitted, pixel_statistics

# The state of a run that a checkpoint keeps beside the tensors, as `files.fits` has it: see `Watch.begin`.
STATE = {"run": str, "optimizer": [{"lr": float, "weight_decay": float}],
         "contents": {str: {"sha256": str, "stamp": object}}, "unlogged": (None, {"step": int}), "warned": bool,
         "gap": float, "best": (None, float), "best_step": (None, int),
         "evaluated": (None, {str: (None, {"mean": float})}),
         "before": dict.fromkeys(("reward", "sgp", *STATISTICS), [float])}
BEFORE = "before training"  # the title of the first look ends so
LEAST = 0.1  # of --lr: the slowest that a run approaches the gap of --land


@torch.no_grad()
def measure(images, prompts, rewards, judging, control, neg, batch=64):
    """Every score of P pictures [P, 3, H, W] in [0, 1] for their P prompts: a dict of [P] float32 tensors on the CPU.

    reward  Eq. 7: r0, of the bare prompt
    sgp     Eq. 9: the SGP gap r1 - r2, the reward's difference between the two prompts, <control> and <neg>

    Both are of the weighted sum of rewards that is trained on. If there are several rewards, each one also has its
    own two scores, "reward LABEL" and "sgp LABEL". The pixel statistics follow, and the verdicts of `judging`, a
    judge or None. batch: pictures scored at a time.
    """
    parts = []
    for i in range(0, len(images), batch):
        x = images[i:i + batch]
        texts = prompts[i:i + batch]
        scores = {"reward": 0, "sgp": 0}
        for label, (model, weight) in rewards.parts.items():
            r0, r1, r2 = model.of(x, sr.texts_of(texts, control, neg))
            each = {"reward": r0.value(), "sgp": sr.relative(r1, r2).value()}
            for name, r in each.items():
                scores[name] = scores[name] + weight * r
                if len(rewards.parts) > 1:
                    scores[f"{name} {label}"] = r
        scores |= pixel_statistics(x)
        if judging is not None:
            scores |= judging.verdicts(x, texts)
        parts.append(scores)
    return {name: torch.cat([part[name].float().cpu() for part in parts]) for name in parts[0]}


class Drift(NamedTuple):
    """How the watched pictures have changed: {statistic: change of the mean}, and the drift warnings as texts."""
    changes: dict
    warnings: list


def hacking(now, before, band):
    """The `Drift` of the watched pictures, with a warning for each sign that the reward is being hacked.

    now, before: scores {name: [P]} of the same prompts and seeds. band: the largest |change| of the mean of each of
    STATISTICS.

    A change of the reward or of the SGP gap counts if it exceeds two standard errors of the paired differences.
    One picture has no standard error, so its change never counts.
    """
    changes = {name: (now[name] - before[name]).mean().item() for name in STATISTICS}
    warnings = []
    for name, limit in zip(STATISTICS, band, strict=True):
        if abs(changes[name]) > limit:
            warnings.append(f"{name} drifted by {changes[name]:+.3f}, outside ±{limit}")
    change = {name: now[name] - before[name] for name in ("reward", "sgp")}
    if len(change["sgp"]) > 1:
        sure = all(d.mean().abs() > 2 * d.std() / len(d) ** 0.5 for d in change.values())
        if sure and change["reward"].mean() > 0 > change["sgp"].mean():
            warnings.append("the reward rises while the SGP gap falls")
    return Drift(changes, warnings)


def sure(gaps):
    """(the mean of SGP gaps [P] less its standard error, the standard error). One picture has none: 0 is taken."""
    error = gaps.std().item() / len(gaps) ** 0.5 if len(gaps) > 1 else 0.0
    return gaps.mean().item() - error, error


def slower(last, before, gap, level):
    """The share of --lr to use until the next look, from LEAST to 1, so that the SGP gap is `level` there. The gap is
    assumed to rise in proportion to the learning rate.

    last: the share since the look before. before, gap: that look's SGP gap and this one's, as `sure` returns them.
    """
    if gap <= before:
        return last
    return min(1.0, max(LEAST, last * (level - gap) / (gap - before)))


class Prompts(NamedTuple):
    """P prompts: their texts, and their embeddings for the network."""
    texts: list
    embeddings: flow.Embeddings


class Watch:
    """The held-out prompts of a run: samples their pictures at noise seeds 0, 1, ..., and scores them."""

    def __init__(self, a, model, world, net, rewards, watched, evaluated, stopping):
        """a: the run's flags. model: a `Model`; its folder may hold a judge. rewards: `srpo_reward.Rewards`.
        watched: the `Prompts` to sample while training. evaluated: those to sample before and after it.
        stopping: a `Stopping`, which is asked between two batches, or None."""
        self.a = a
        self.world = world
        self.net = net
        self.rewards = rewards
        self.judge = judge.load_judge(model.name, a.size)
        self.watched = watched
        self.evaluated = evaluated
        self.stopping = stopping
        self.titles = watched.texts  # the watched prompts as report.html and before_after.png show them
        self.photographs = []  # [3, H, W] each: held out; their captions are the first watched prompts
        self.level = None  # the SGP gap at which the run ends (--land); None: it ends after --steps
        self.model = model
        self.about = card.about(a, model)  # the metadata of the weights' files
        self.flags = ""  # the run's flags as one line for its report; train.py sets it
        self.grid = net.grid(a.size, a.size)

    def look(self, prompts, title):
        """Pictures [n, 3, H, W] of n `Prompts`, and their scores {name: [n]}. The processes share the work, and each
        of them gets all results. Raises NotFinite for a score that is not finite, and Stopped."""
        n = len(prompts.texts)
        each = -(-n // self.world.size)
        rows = [min(i, n - 1) for i in range(each * self.world.size)][self.world.rows(each)]
        helps = "" if title.endswith(BEFORE) else "; try a smaller --lr, or another --seed"
        try:
            images = flow.sample(self.net, prompts.embeddings.txt[rows], prompts.embeddings.pooled[rows],
                                 flow.noise(self.net, self.grid, rows), self.grid, self.a.eval_steps,
                                 self.a.guidance, self.a.batch, partial(self.batches, title))
        except NotFinite as error:
            raise NotFinite(f"{title}: {error}{helps}") from error
        texts = [prompts.texts[row] for row in rows]
        scores = measure(images, texts, self.rewards, self.judge, self.a.control[0], self.a.neg[0])
        everyones = self.world.gather((images, scores))
        images = torch.cat([images for images, _ in everyones])[:n]
        scores = {name: torch.cat([scores[name] for _, scores in everyones])[:n] for name in scores}
        for name, values in scores.items():
            if name not in judge.UNDEFINED and not values.isfinite().all():
                raise NotFinite(f"{title}: {name} of the held-out pictures is not finite{helps}")
        return images, scores

    def batches(self, title, batches):
        """Yields the batches of a look, with a progress bar if there are five or more. Raises Stopped between two."""
        for batch in tqdm(batches, title, leave=False, disable=len(batches) < 5 or not self.world.main):
            if self.stopping is not None:
                self.stopping.check(self.world)
            yield batch

    def evaluate(self, title):
        """The table's row of the first --eval prompts, {column: `tables.mean`}; None with --eval 0."""
        if not self.a.eval:
            return None
        images, scores = self.look(self.evaluated, title)
        return self.summary(images, scores, self.evaluated)

    def summary(self, images, scores, prompts):
        """The means of a look at `Prompts`: {column: `tables.mean`}. The miniature, the small model whose world is
        drawn, also gets the Frechet distance of all pictures together."""
        of_all = {} if self.judge is None else frechet.of_pictures(images, prompts.texts)
        return tables.summary(scores) | of_all

    def begin(self, folder):
        """The first look, at the base model or at --weights. Returns the run's state, a dict that checkpoints keep."""
        if self.a.watch == 1:
            self.world.say("--watch 1: one picture has no standard error, so the drift warning cannot see the reward "
                           "rise while the SGP gap falls; give 2 or more")
        # With --weights, a LoRA is part of what the run starts from. New adapters are not, so they are switched off.
        with nullcontext() if self.a.weights else lora.adapter_off(self.net.transformer):
            images, scores = self.look(self.watched, f"watch {BEFORE}")
            evaluated = self.evaluate(f"evaluate {BEFORE}")
        if self.world.main:
            save_grid(images, folder.out / "samples" / "step_00000.png")
            if self.photographs:
                beside = [fitted(photograph, self.a.size, "letterbox") for photograph in self.photographs]
                save_grid(torch.stack(beside), folder.out / "samples" / PHOTOGRAPHS)
            folder.show(0, {"watch": {name: values.nanmean().item() for name, values in scores.items()}},
                        watched_pictures=folder.out / "samples" / "step_00000.png")
        gap = sure(scores["sgp"])[0]
        if self.level is not None and gap >= self.level:
            raise UserError(f"--land {self.a.land}: before training the watched pictures' SGP gap less its standard "
                            f"error is {gap:+.3f}, and --land's {self.level:+.3f}; give a higher one, or other "
                            "--control and --neg")
        of_all = {name: [value["mean"]] for name, value in self.summary(images, scores, self.watched).items()
                  if value and name not in scores}
        return {"run": folder.id, "images": self.a.global_batch, "step": 0, "unlogged": None, "gap": gap,
                "best": None, "best_step": None, "warned": False,
                "before": {name: values.tolist() for name, values in scores.items()} | of_all,
                "evaluated": evaluated}

    def log(self, folder, state):
        """Write the step's line, which waits in the state, to the log; every --watch-every steps, look first.

        If the run is asked to stop during the look, the line stays in the state, and --resume logs it."""
        line = state["unlogged"]
        if line["step"] % self.a.watch_every == 0 or line["step"] == self.a.steps:
            line |= self.step(line["step"], folder, state)
        if self.world.main:
            folder.log(line)
            if "watch" in line:
                self.report(folder, state)
        state["unlogged"] = None

    def report(self, folder, state, status="running"):
        """Write report.html, the run's page. status: one of a report's `Run`."""
        report.write(folder.out, vars(self.a), self.flags, status, state, self.titles)

    def step(self, step, folder, state):
        """Look at the watched pictures and print the drift warnings. Export the weights if no warning fired and the SGP
        gap is the highest so far. Returns what to log."""
        images, now = self.look(self.watched, f"watch after step {step}")
        before = {name: torch.tensor(values) for name, values in state["before"].items()}
        drift = hacking(now, before, self.a.drift_band)
        for warning in drift.warnings:
            self.world.say(f"step {step}: drift warning: {warning}")
        if drift.warnings and not state["warned"]:
            self.world.say(report.advice(drift.warnings, state, vars(self.a)))
        state["warned"] = bool(drift.warnings)
        sgp = now["sgp"].mean().item()
        gap, error = sure(now["sgp"])
        if self.level is not None:
            state["share"] = slower(state.get("share", 1.0), state["gap"], gap, self.level)
        state["gap"] = gap
        if self.landed(state):
            self.world.say(f"step {step}: landed: the watched SGP gap is {sgp:+.3f} ± {error:.3f}, and --land's "
                           f"{self.level:+.3f}")
        if not drift.warnings and (state["best"] is None or sgp > state["best"]):
            lora.export(self.net.transformer, folder.out / "weights_best", self.world, self.net.dtype, self.about)
            state |= {"best": sgp, "best_step": step}
        if self.world.main:
            save_grid(images, folder.out / "samples" / f"step_{step:05d}.png")
            folder.show(step, {}, watched_pictures=folder.out / "samples" / f"step_{step:05d}.png")
        means = {name: value and value["mean"]
                 for name, value in self.summary(images, now, self.watched).items()}
        found = {"drift": drift.changes, "watch": means, "hacking": drift.warnings}
        return found if self.level is None else found | {"land": self.level, "landed": self.landed(state)}

    def before_and_after(self, out, step):
        """Write before_after.png: the first watched pictures above those after an update, with their prompts."""
        lines = []
        for number in (0, step):
            path = out / "samples" / f"step_{number:05d}.png"
            if not path.is_file():
                return
            grid = read_picture(path)
            boxes = places(grid, self.a.size, len(self.watched.texts))
            lines.append([grid.crop((x, y, x + w, y + h)) for x, y, w, h in boxes])
        columns = [sheets.Column(sheets.label_of(prompt, seed), pictures)
                   for seed, (prompt, *pictures) in enumerate(zip(self.titles, *lines, strict=False))]
        sheets.save(["before", f"update {step}"], columns, out / "before_after.png")

    def cards(self, out, state, made=()):
        """Write the model cards of the run's weights. made: the `Table`s of its results, if it has ended."""
        for name, step in (("weights", state["step"]), ("weights_best", state["best_step"])):
            if step is not None:
                card.write(out / name, self.a, self.model, self.flags, made, step)

    def lr(self, state):
        """The learning rate of the next update: --lr, or less where the run is about to land."""
        return self.a.lr if self.level is None else self.a.lr * state.get("share", 1.0)

    def landed(self, state):
        """Whether the last look's SGP gap has surely reached that of --land."""
        return self.level is not None and state["gap"] >= self.level

    def finish(self, folder, state):
        """Evaluate after training. Write before_after.png (first watched pictures above the last), summary.json, the
        report and the tables, and print the tables."""
        after = self.evaluate("evaluate after training")
        if not self.world.main:
            return
        out = folder.out
        self.before_and_after(out, state["step"])
        if self.level is not None and not self.landed(state):
            self.world.say(f"not landed: after {state['step']} updates the watched SGP gap less its standard error is "
                           f"{state['gap']:+.3f}, and --land's {self.level:+.3f}; give more --steps and --resume")
        write_json(out / "summary.json", {"steps": state["step"], "best_sgp": state["best"],
                                          "before": state["evaluated"], "after": after})
        self.report(folder, state, "finished")
        made = curves.numbers([report.run_of(out, vars(self.a), self.flags, "finished", state)])
        table_formats.write(out, made)
        print(table_formats.for_the_terminal(made) + "\n")
        self.cards(out, state, made)
        out = printable(out)
        print(f"weights: {out}/weights; those of the best look without a drift warning: {out}/weights_best\n"
              f"pictures: {out}/before_after.png; the run on one page: {out}/{report.PAGE}")
