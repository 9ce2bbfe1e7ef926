"""SRPO: align FLUX.1 with the difference between two prompts (arXiv 2509.06942).

    python train.py --model miniature                                                              on a laptop
    torchrun --nproc_per_node=8 train.py --control "realistic photo" --neg "CG render"             FLUX.1-dev

From top to bottom: the recipe, which is the released one unless a flag or --recipe says otherwise; `srpo`,
the loss of one update; the set-up; the loop. The mathematics is in direct_align.py (Eqs. 3-6) and
srpo_reward.py (Eqs. 7-13).
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import direct_align as da
import flux
import rewards
import srpo_reward as sr
from engine import cards, checkpoint, command_line, data, lora, memory, parallel, plan
from engine.command_line import Parser, add_machine_flags, as_line, or_off, parse, real, whole, words
from engine.contents import Contents
from engine.errors import Stopped, UserError, frame
from engine.finite import first_not_finite, stop_after_the_step, stop_before_the_step
from engine.run_folder import RunFolder
from engine.stopping import Stopping
from evaluation import watch
from evaluation.explain import explain


# ------------------------------------------------------------------------------------------------- the recipe
def add_recipe(parser):
    """Every hyper-parameter: its default, its unit, and where the default comes from."""
    add = parser.add_argument_group("what is trained").add_argument
    add("--model", default="black-forest-labs/FLUX.1-dev", help="folder in FLUX.1-dev's layout, or hub id; "
        "its srpo.json, if there is one, holds defaults that suit it")
    add("--prompts", default="hpdv2",
        help="text file, one training prompt a line; hpdv2: fetched from the hub [paper 4.1]")
    add("--size", type=whole(1), default=720, help="side of the pictures, pixels [released code]")
    add("--seed", type=whole(0, 2**31 - 1), default=0, help="of noise, noise levels and prompt order [ours]")

    add = parser.add_argument_group("the optimizer: AdamW, betas 0.9 and 0.999").add_argument
    add("--steps", type=whole(1), default=19, help="updates; users see collapse by 20 to 50 [released code]")
    add("--batch", type=whole(1), default=1, help="images at a time, of a process [released code]")
    add("--accumulate", type=whole(1), default=1, help="batches whose gradients are averaged in an update: "
        "32 on one GPU are the released code's 32 images on 32 GPUs [ours]")
    add("--lr", type=real(0, 1e3, open_low=True), default=5e-6, help="constant learning rate [released code]")
    add("--weight-decay", type=real(0, 1e3), default=1e-4, help="AdamW's [released code]")
    add("--clip", type=real(0, open_low=True), default=0.1, help="largest gradient norm [released code]")

    add = parser.add_argument_group("the rollout, from noise to the clean latents x0").add_argument
    add("--rollout-steps", type=whole(1), default=25, help="Euler steps [paper 4.1]")
    add("--rollout-guidance", type=real(0), default=1.0, help="distilled guidance [released code]")
    add("--shift", type=or_off(real(1e-3)), default=3.0,
        help="time shift; off: the model's own [released code]")
    add("--noise", choices=["shared", "independent", "fresh"], default="shared", help="one noise prior for "
        "all images of an update [released code], one each, or shared but with fresh noise to inject")

    add = parser.add_argument_group("Direct-Align (Eqs. 3-6)").add_argument
    add("--sigma-range", type=real(0, 1, open_high=True), nargs=2, default=[27 / 28, 0.75],
        metavar=("MAX", "MIN"), help="noise levels that are trained [released code: 0.9643 0.75]")
    add("--cells", type=whole(20, 10**6), default=1000, help="grid cells in that range [released code]")
    add("--groundtruth-ratio", type=real(0, 1), default=0.92, help="share of the range left to the known "
        "noise; the network is called the rest away from where it lands "
        "[released code: 0.92 HPS, 0.9 PickScore]")
    add("--branches", type=words, default=["denoise", "invert"], help="denoise, invert, or both [paper 3.2]")
    add("--injections", type=whole(1), default=1,
        help="n of Eq. 6: noise levels that a branch visits per image [released code]")
    add("--guidance", type=real(0), default=3.5,
        help="distilled guidance of these calls, and of samples [released code]")
    add("--meet", choices=["landing", "call"], default="landing", help="where the branches meet: at the "
        "level they land on [released code], or at the level they call the network [paper]")
    add("--recover", choices=["velocity", "epsilon"], default="velocity",
        help="Eq. 5 for a velocity [released code], or as printed")
    add("--lam", type=real(0), nargs=2, default=[1.0, 1.0], metavar=("EARLY", "LATE"),
        help="lambda(t) of Eq. 6 at both ends of --sigma-range [released code: none]")

    add = parser.add_argument_group("the reward (Eqs. 7-13)").add_argument
    add("--reward", default="hpsv2.1", help=f"{', '.join(rewards.names())} (NAME=PATH: weights from there), "
        "a .pt in HPSv2.1's layout, or an open_clip folder; several with weights: hpsv2.1:0.7,pickscore:0.3; "
        "weight 0: held out, watched only [paper 4.1]")
    add("--control", type=words, default=["Natural-lighting", "Detail", "Detailed", "Real"],
        help="wanted words, comma-separated, cycling with the step [released code]")
    add("--neg", type=words, default=["Concept art", "Painting", "Anime", "Flat", "Oil"],
        help="unwanted words, likewise [released code]")
    add("--form", choices=sr.FORMS, default="released", help="which reward in which branch: the table in "
        "srpo_reward.branch_reward [released code]")
    add("--cfg-k", type=real(), default=1.5, help="k of Eq. 11, for --form cfg [ours; the paper gives none]")
    add("--discount-denoise", type=real(-1), nargs=2, default=[0.1, 0.25], metavar=("LATE", "EARLY"),
        help="d of --form released, denoising branch [released code]")
    add("--discount-invert", type=real(-1), nargs=2, default=[0.3, 0.01], metavar=("LATE", "EARLY"),
        help="the same, inverting branch [released code]")
    add("--threshold", type=or_off(real()), default=0.7,
        help="relu(threshold - r) instead of -r, or off [released code]")


# Named sets of flags, for --recipe. "fast" needs no good rollout, since any x0 can be recovered from known
# noise, and one branch, since its form leaves nothing that the other would cancel. "paper" takes the printed
# form of Eqs. 5, 6, 12 and 13, of the noise and of the guidance. It leaves out Eq. 11 (--form cfg; the
# branches are printed with one text each), the whole trajectory (--sigma-range 0.99 0.01) and the words of
# the evaluation.
RECIPES = {
    "released": "",
    "fast": "--form srp --branches denoise --rollout-steps 4",
    "paper": "--form branches --recover epsilon --meet call --lam 1 0.4 --injections 2 --threshold off "
             "--noise independent --rollout-guidance 3.5 --shift off"}


def parser():
    """All flags of this script."""
    p = Parser(__doc__)
    add_recipe(p)
    p.add_argument("--recipe", choices=RECIPES, default="released",
                   help=f"fast: {RECIPES['fast']}, a quarter of FLUX.1-dev's work [ours]; paper: "
                        f"{RECIPES['paper']} [ours where the paper gives no number]")
    watch.add_flags(p)
    add_machine_flags(p)
    p.add_argument("--explain", action="store_true", help="tell one update call by call, with equations and "
                   "shapes, and draw it: explain.png in --out; nothing is trained")
    return p


def flags(argv):
    """The flags of a command line, checked as far as no file is needed. Raises UserError."""
    a = parse(parser(), argv, flux.defaults_of, RECIPES)
    high, low = a.sigma_range
    if high - low < 1e-3:
        raise UserError(f"--sigma-range {high} {low}: give MAX then MIN, 0.001 apart at least")
    if a.lam == [0, 0]:
        raise UserError("--lam 0 0: every loss would be 0, and there is nothing to learn")
    if not a.branches or len(set(a.branches)) < len(a.branches) or set(a.branches) - {"denoise", "invert"}:
        raise UserError(f"--branches {','.join(a.branches)}: must be denoise, invert or denoise,invert")
    command_line.must_differ(a.control, a.neg)
    if a.resume and a.overwrite:
        raise UserError("--resume --overwrite: go on with the run in --out, or start again; give one")
    plan.check_card(a.card)
    flux.check_folder(a.model)
    flux.check_size(a.model, a.size)
    rewards.parse_rewards(a.reward)
    memory.check(a.lora, a.memory)
    return a


def notes(a):
    """What the flags come to that nobody may have meant: a list of lines."""
    lines = []
    if a.threshold is not None and a.form in ("plain", "sgp") and len(a.branches) == 2:
        lines.append(f"--form {a.form} --threshold {a.threshold}: the reward of the inverting branch is that "
                     "of the denoising one with its sign turned, so the threshold stops one of the two at "
                     "most; --threshold off stops neither")
    return lines


# ------------------------------------------------------------------------------ one update: Eqs. 3-6 and 9-13
class Batch(NamedTuple):
    """What an update begins with, for B images."""
    prompts: list          # B texts
    c: flux.Condition      # the same, as the network reads them
    x0: torch.Tensor       # clean latents [B, N, C], or None: the model's own, to be rolled out
    start: torch.Tensor    # [B, N, C] the noise that a rollout begins with
    eps: torch.Tensor      # [B, N, C] the noise prior that is injected
    C0: torch.Tensor       # [B, D] text features of the prompts
    C1: torch.Tensor       # [B, D] the same, of "<control>. <prompt>"
    C2: torch.Tensor       # [B, D] the same, of "<neg>. <prompt>"
    middles: list          # --injections draws m [B] of where in the training grid the branches meet


class Term(NamedTuple):
    """One term of Eq. 6's sum, all of it: for the log, and for --explain."""
    branch: str            # "denoise" or "invert"
    sigma: torch.Tensor    # [B] where the network is called
    sigma_to: torch.Tensor  # [B] where it lands
    x0: torch.Tensor       # [B, N, C]
    x_t: torch.Tensor      # [B, N, C]
    v_theta: torch.Tensor  # [B, N, C], with gradient
    x0_hat: torch.Tensor   # [B, N, C], with gradient
    image: torch.Tensor    # [B, 3, H, W], with gradient
    f: torch.Tensor        # [B, D] its feature, with gradient
    d: torch.Tensor        # [B] the released discount
    reward: torch.Tensor   # [B], with gradient
    sgp: torch.Tensor      # [B] f.(C1 - C2), the SGP gap


def srpo(a, net, reward, batch):
    """SRPO: yields (loss, `Term`) for every term of Eq. 6's sum, whose gradients add up at constant memory.

    a: the flags; net: a `flux.Flux`; reward: a `srpo_reward.Rewards`; batch: a `Batch`. The caller calls
    backward on each loss as it comes.
    """
    x0 = batch.x0
    if x0 is None:
        sigmas = da.sigma_steps(a.rollout_steps, a.shift or net.shift(batch.start.shape[1]))
        x0 = net.rollout(batch.start, batch.c, sigmas, a.rollout_guidance)  # [B, N, C]
    grid = da.training_grid(*a.sigma_range, a.cells)
    reach = da.reach_of(a.groundtruth_ratio, a.cells)
    n = a.injections * len(a.branches)
    for m in batch.middles:
        for branch in a.branches:
            at = da.place(branch, m, grid, reach, a.meet).to(x0.device)
            x_t = da.inject(x0, batch.eps, at.sigma)                             # Eq. 3
            v_theta = net.velocity(x_t, at.sigma, batch.c, a.guidance)           # the call with a gradient
            if a.recover == "velocity":
                x0_hat = da.recover(x_t, v_theta, batch.eps, at.sigma, at.sigma_to)  # Eq. 5
            else:
                eps_theta = da.epsilon(x_t, v_theta, at.sigma)
                x0_hat = da.recover_epsilon(x_t, eps_theta, batch.eps, at.sigma, at.sigma_to)  # as printed
            image = net.decode(x0_hat, batch.c.grid)                             # [B, 3, H, W]
            f = reward.image_features(image)                                     # [B, D]
            d = da.discount(at.cell, *discount_of(a, branch), a.cells)           # [B]
            r = sr.branch_reward(a.form, branch, f, batch.C0, batch.C1, batch.C2, d, a.cfg_k)  # Eqs. 12, 13
            weight = da.lam(at.sigma, *a.sigma_range, *a.lam)                    # [B]
            loss = da.aggregate(sr.loss(r, a.threshold), weight, n).mean()       # Eq. 6
            sgp = sr.relative(f.detach(), batch.C1, batch.C2)
            yield loss, Term(branch, at.sigma, at.sigma_to, x0, x_t, v_theta, x0_hat, image, f, d, r, sgp)


def discount_of(a, branch):
    """The ends of the released discount of a branch: (late, early)."""
    return a.discount_denoise if branch == "denoise" else a.discount_invert


# ------------------------------------------------------------------------------------------------- the set-up
@dataclass
class Run:
    """All that the loop needs beside the flags."""
    world: parallel.World
    net: flux.Flux
    reward: sr.Rewards
    curriculum: data.Curriculum
    embeddings: flux.Embeddings
    watched: watch.Watch
    optimizer: torch.optim.Optimizer
    grid: tuple            # (rows, columns) of tokens of a picture
    contents: Contents = None  # of what was read, to be compared when the run is resumed

    def batch(self, a, step, part):
        """The part-th of the --accumulate batches of an update, a `Batch`."""
        device = self.net.device
        first = (self.world.rank * a.accumulate + part) * a.batch
        images = a.batch * a.accumulate * self.world.size
        chance = data.Chance(a.seed, step, images, slice(first, first + a.batch))
        rows = self.curriculum.rows[step][part * a.batch:(part + 1) * a.batch]
        texts = [self.curriculum.prompts[row] for row in rows]
        shape = (self.grid[0] * self.grid[1], self.net.transformer.config.in_channels)
        start = chance.normal(*shape) if a.noise == "independent" else chance.normal_shared(*shape)
        eps = chance.normal_shared(*shape) if a.noise == "fresh" else start
        middles = []
        for _ in range(a.injections):
            middles.append(da.draw_middle(images, a.cells, chance.generator)[chance.mine])
        control, neg = a.control[step % len(a.control)], a.neg[step % len(a.neg)]
        C0, C1, C2 = self.reward.conditions(texts, control, neg)  # [B, D] each
        return Batch(texts, self.embeddings.condition(rows, self.grid, device), None, start.to(device),
                     eps.to(device), C0, C1, C2, middles)


def job(a):
    """What the plan needs to know of a run."""
    configs = flux.configs(a.model)
    rows, columns = flux.token_grid(configs.vae, a.size, a.size)
    return plan.Job(
        model=a.model, transformer=configs.transformer, vae=configs.vae, text_tokens=configs.text_tokens,
        size=a.size, image_tokens=rows * columns, batch=a.batch,
        accumulate=a.accumulate, rollout_steps=a.rollout_steps, calls=a.injections * len(a.branches),
        checkpointing=a.checkpointing, replicas=a.replicas,
        reward_networks=partial(rewards.image_networks, a.reward), lora=a.lora,
        memory=a.memory)


def settle(a, world):
    """Decide --memory auto, and say why. Raises UserError, with the command that would do, if nothing
    fits."""
    a.memory, why = world.decide(cards.settle, job(a), world)
    if why:
        world.say(why)


def set_up(a, world, stopping=None):
    """Read, encode and load everything: a `Run`. Nothing is written. Raises UserError."""
    flux.needs_gpu(a.model)
    prompts = data.read_prompts(a.prompts)
    evaluated = data.read_prompts(a.eval_prompts, "--eval-prompts")
    held_out = evaluated[:a.eval]
    chosen_by = data.read_prompts(a.watch_prompts, "--watch-prompts") if a.watch_prompts else evaluated
    chosen_by = chosen_by[:a.watch]
    mine = a.batch * a.accumulate  # images of an update that this process makes
    curriculum = data.Curriculum(prompts, a.steps, mine * world.size, world.rows(mine), a.seed)
    both = curriculum.prompts + chosen_by + held_out
    embeddings = flux.encode_prompts(a.model, both, world.device, world.dtype)
    if embeddings.truncated:
        world.say(f"{embeddings.truncated} of {len(both)} prompts are longer than the text encoder takes, "
                  "and are truncated")
    reward = rewards.load_rewards(a.reward, world.device)
    layout = memory.Layout(a.lora, a.memory, a.seed)
    net = flux.load(a.model, None, world.device, world.dtype, world, layout)
    if a.checkpointing and world.device.type == "cuda":
        net.transformer.enable_gradient_checkpointing()
    if a.compile:
        for block in parallel.blocks_of(net.transformer):
            block.compile()
    optimizer = memory.optimizer_of(memory.trainable(net.transformer), a.lr, a.weight_decay, a.memory,
                                    world.device)
    first = len(curriculum.prompts)
    last = first + len(chosen_by)
    watched = watch.Watch(a, world, net, reward, watch.Prompts(chosen_by, embeddings.part(first, last)),
                          watch.Prompts(held_out, embeddings.part(last, len(both))), stopping)
    texts = {"--prompts": prompts, "--watch-prompts": chosen_by, "--eval-prompts": held_out}
    places = {"--model": flux.files_of(a.model)}
    for number, part in enumerate(rewards.parse_rewards(a.reward), 1):
        texts[f"the weight of reward {number}"] = [str(part.weight)]
        places[f"reward {number}"] = [rewards.fetch(part.name, part.where)]
    return Run(world, net, reward, curriculum, embeddings, watched, optimizer, net.grid(a.size, a.size),
               Contents(texts, places))


# --------------------------------------------------------------------------------------------------- the loop
def train(a, run, folder, state, stopping):
    """Updates until --steps, with checkpoints; raises Stopped if it is asked to stop. `state` is what a
    checkpoint remembers beside the weights, of the last update that was finished."""
    world = run.world
    net = run.net
    parameters = memory.trainable(net.transformer)
    flop = plan.update_flop(job(a))  # of this process
    bar = tqdm(range(state["step"] + 1, a.steps + 1), initial=state["step"], total=a.steps, desc="train",
               disable=not world.main)
    for step in bar:
        started = parallel.clock(net.device)
        net.seconds_in_rollout = 0.0
        numbers = []
        trouble = None
        for part in range(a.accumulate):
            stopping.check(world)
            batch = run.batch(a, step, part)
            for loss, term in srpo(a, net, run.reward, batch):
                trouble = trouble or first_not_finite(batch.prompts, x0=term.x0, v_theta=term.v_theta,
                                                      image=term.image, reward=term.reward)
                (loss / a.accumulate).backward()
                numbers.append({f"reward_{term.branch}": term.reward.mean().item(),
                                "sgp": term.sgp.mean().item()})
        norm = parallel.full(torch.nn.utils.clip_grad_norm_(parameters, a.clip))
        if norm == 0:
            world.say(f"step {step}: the gradient is 0: " + ("nothing is left to learn" if a.threshold is None
                      else f"every reward is above --threshold {a.threshold}; --threshold off"))
        trouble = trouble or first_not_finite([batch.prompts], gradient=norm.view(1))
        stop_before_the_step(trouble, step, world, net.transformer, folder.out / "weights", net.dtype)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        stop_after_the_step(parameters, step, folder.out, folder.id, world)
        seconds = parallel.clock(net.device) - started
        line = {"step": step, **world.mean(numbers), "grad_norm": norm.item(),
                "seconds_rollout": round(net.seconds_in_rollout, 3),
                "seconds_update": round(seconds - net.seconds_in_rollout, 3),
                **plan.achieved(flop, seconds, net.device)}
        state |= {"step": step, "unlogged": line}
        stopping.words = f"stopped after step {step}, saved; --resume continues"
        run.watched.log(folder, state)
        if "watch" in line:
            hacked = "YES" if line["hacking"] else "no"
            bar.set_postfix(sgp=f"{line['watch']['sgp']:+.3f}", hacking=hacked)
        if step % a.save_every == 0 or step == a.steps:
            save(a, run, folder, state)


def save(a, run, folder, state):
    """Write a checkpoint of the last update that was finished, if there is none yet."""
    if folder.saved != state["step"]:
        state["contents"] = run.contents.result()
        checkpoint.save(folder.out, run.net.transformer, run.optimizer, state, run.world, a.keep)
        folder.saved = state["step"]


def main():
    """Plan, explain, or train: from the command line to the run's folder."""
    with frame("train.py"):
        stopping = Stopping("stopped before the first update: there is nothing to save")
        a = flags(sys.argv[1:])
        out = Path(a.out or f"runs/{Path(a.model).name}")
        if a.plan:
            if a.memory == "auto":
                a.memory = memory.on_a_cpu(a.lora)
            plan.show(job(a), a.world_size, a.card, a.share)
            return cards.show_cards(job(a), a.share)
        if a.explain:  # two images are told and drawn
            a.steps = 1
            a.batch = min(a.batch, 2)
            a.accumulate = 2 // a.batch
            world = parallel.World(mesh=memory.needs_mesh(a.memory))
            settle(a, world)
            return explain(a, set_up(a, world), srpo, out)
        world = parallel.World(a.replicas, mesh=memory.needs_mesh(a.memory))
        settle(a, world)
        folder = world.decide(RunFolder, out, vars(a), a.batch * a.accumulate * world.size)
        if folder.checkpoints:
            newest = folder.checkpoints[-1].name
            stopping.words = f"stopped before another update; {newest} is there, and --resume continues"
        run = set_up(a, world, stopping)
        stopping.later(stopping.words)
        world.decide(folder.open)
        run.watched.flags = as_line(parser(), vars(a))
        world.say(run.watched.flags)
        for note in notes(a):
            world.say(note)
        if folder.checkpoints:
            state = checkpoint.load_newest(folder.checkpoints, run.net.transformer, run.optimizer, world)
            world.decide(run.contents.compare, state["contents"])
            world.decide(folder.go_on_from, state)
            if state["unlogged"] is not None:
                run.watched.log(folder, state)
        else:
            if a.resume:
                world.say(f"--resume: no checkpoint in {out}; the run starts from the beginning")
            world.decide(run.contents.begin)
            state = run.watched.begin(folder)
        folder.saved = state["step"]
        try:
            train(a, run, folder, state, stopping)
        except Stopped:
            save(a, run, folder, state)
            if world.main:
                run.watched.report(folder, state, stopped=True)
            raise
        lora.export(run.net.transformer, out / "weights", world, run.net.dtype)
        stopping.words = f"stopped after the last update; its weights are in {out}/weights"
        run.watched.finish(folder, state)
        world.close()


if __name__ == "__main__":
    main()
