"""SRPO: align FLUX.1 with the difference between two prompts (arXiv 2509.06942).

    python train.py --model miniature                                                              on a laptop
    torchrun --nproc_per_node=8 train.py --control "realistic photo" --neg "CG render"             FLUX.1-dev

From top to bottom: the recipe, which is the released one unless a flag or --recipe says otherwise; `srpo`,
the loss of one update; the loop. The mathematics is in direct_align.py (Eqs. 3-6) and srpo_reward.py (Eqs.
7-13); what the paper compares with, --method, in baselines.py (Eqs. 1-2); the set-up in prepare.py.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import baselines
import direct_align as da
import flux
import prepare
import rewards
import srpo_reward as sr
from engine import (
    cards,
    checkpoint,
    command_line,
    lora,
    memory,
    parallel,
    plan,
    trained,
)
from engine.command_line import Parser, add_machine_flags, as_line, or_off, parse, real, whole, words
from engine.errors import Stopped, UserError, frame
from engine.finite import Trouble, first_not_finite, stop_after_the_step, stop_before_the_step
from engine.run_folder import RunFolder
from engine.stopping import Stopping
from evaluation import watch
from evaluation.explain import explain

# ------------------------------------------------------------------------------------------------- the recipe
# Of FLUX.1-dev's adapters: 20 times the released rate of full weights. Adam steps that move B A x as far as
# W x need sqrt(3 d_in / R) times the rate, 17 at rank 32, and the miniature wanted somewhat more than that.
LORA_LR = 1e-4


def add_recipe(parser):
    """Every hyper-parameter: its default, its unit, and where the default comes from."""
    add = parser.add_argument_group("what is trained").add_argument
    add("--model", default="black-forest-labs/FLUX.1-dev", help="folder in FLUX.1-dev's layout, or hub id; "
        "its srpo.json, if there is one, holds defaults that suit it")
    add("--weights", type=command_line.some_path, help=f"{trained.HELP}, which --lora of its rank goes on "
        "with, and a run without --lora merges")
    add("--method", choices=METHODS, default="srpo", help="what makes the loss: srpo, or one of the paper's "
        "baselines, which climb the reward of the bare prompt (Eq. 7): refl (Eq. 2), draft-lv (Eq. 1), "
        "dancegrpo")
    add("--prompts", default="hpdv2",
        help="text file, one training prompt a line; .json, .jsonl or .csv; hpdv2: from the hub [paper 4.1]")
    add("--images", metavar="DIR", help="offline: photographs to inject noise into, in place "
        "of a rollout; their captions, in .txt files beside them or a metadata.jsonl, are the prompts [ours]")
    add("--size", type=whole(1), default=720, help="side of the pictures, pixels; of --images, the root of "
        "their area [released code]")
    add("--seed", type=whole(0, 2**31 - 1), default=0, help="of noise, noise levels and prompt order [ours]")

    add = parser.add_argument_group("the optimizer: AdamW, betas 0.9 and 0.999").add_argument
    add("--steps", type=whole(1), default=19, help="updates; users see collapse by 20 to 50 [released code]")
    add("--batch", type=whole(1), default=1, help="images at a time, of a process [released code]")
    add("--accumulate", type=whole(1), default=1, help="batches whose gradients are averaged in an update: "
        "32 on one GPU are the released code's 32 images on 32 GPUs [ours]")
    add("--lr", type=real(0, 1e3, open_low=True), default=5e-6, help="constant learning rate [released "
        f"code]; with --lora {LORA_LR:g}, a guess, unless the model's srpo.json knows better [ours]")
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
    add("--lam-shift", type=real(1e-3), default=1.0, help="between them lambda(t) follows the time shift of "
        "this strength; 1: a straight line [the authors' second recipe: 3]")

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

    add = parser.add_argument_group("the baselines").add_argument
    add("--refl-steps", type=whole(1), default=6, help="refl: a rollout stops 1 to so many steps before its "
        "end [as ReFL, the last quarter]")
    add("--group", type=whole(2), default=12, help="dancegrpo: images of a prompt, which are compared; "
        "--batch is a multiple of it [DanceGRPO]")


# Named sets of flags, for --recipe. "fast" needs no good rollout, since any x0 can be recovered from known
# noise, and one branch, since its form leaves nothing that the other would cancel. "paper" takes the printed
# form of Eqs. 5, 6, 12 and 13, of the noise and of the guidance. It leaves out Eq. 11 (--form cfg; the
# branches are printed with one text each), the whole trajectory (--sigma-range 0.99 0.01) and the words of
# the evaluation. "direct-align" is section 3.1 alone, a row of Table 1; the paper does not print its 2 and
# 0.4. "2026" is the authors' recipe for Qwen-Image, with words, reward and learning rate left to the flags.
RECIPES = {
    "released": "",
    "fast": "--form srp --branches denoise --rollout-steps 4",
    "paper": "--form branches --recover epsilon --meet call --lam 1 0.4 --injections 2 --threshold off "
             "--noise independent --rollout-guidance 3.5 --shift off",
    "direct-align": "--form plain --branches denoise --injections 2 --lam 1 0.4 --threshold off",
    "2026": "--form srp --branches denoise --injections 2 --lam 1 0 --lam-shift 3 --sigma-range 0.9 0.2 "
            "--cells 100 --groundtruth-ratio 0.6 --threshold off"}


def parser():
    """All flags of this script."""
    p = Parser(__doc__)
    add_recipe(p)
    p.add_argument("--recipe", choices=RECIPES, default="released",
                   help=f"fast: {RECIPES['fast']}, a quarter of FLUX.1-dev's work [ours]; paper: "
                        f"{RECIPES['paper']} [ours where the paper gives no number]; direct-align, Table 1's "
                        f"row: {RECIPES['direct-align']} [2 and 0.4 are ours]; 2026, the authors' second "
                        f"recipe: {RECIPES['2026']}")
    watch.add_flags(p)
    add_machine_flags(p)
    p.add_argument("--explain", action="store_true", help="tell one update call by call, with equations and "
                   "shapes, and draw it: explain.png in --out; nothing is trained")
    return p


def flags(argv):
    """The flags of a command line, checked as far as no file is needed. Raises UserError."""
    a = parse(parser(), argv, own_defaults, RECIPES)
    high, low = a.sigma_range
    if high - low < 1e-3:
        raise UserError(f"--sigma-range {high} {low}: give MAX then MIN, 0.001 apart at least")
    if a.lam == [0, 0]:
        raise UserError("--lam 0 0: every loss would be 0, and there is nothing to learn")
    if a.explain and a.method != "srpo":
        raise UserError(f"--explain --method {a.method}: only srpo is told")
    if a.images is not None and a.method != "srpo":
        raise UserError(f"--images --method {a.method}: it learns from its own rollouts; only srpo takes "
                        "photographs")
    if a.images is not None and a.noise == "fresh":
        raise UserError("--images --noise fresh: there is no rollout whose noise could be another; every "
                        "photograph gets noise of its own")
    if not a.branches or len(set(a.branches)) < len(a.branches) or set(a.branches) - {"denoise", "invert"}:
        raise UserError(f"--branches {','.join(a.branches)}: must be denoise, invert or denoise,invert")
    command_line.must_differ(a.control, a.neg)
    if a.method == "dancegrpo" and (a.batch % a.group or a.accumulate > 1 or a.rollout_steps < 2):
        raise UserError(f"--batch {a.batch} --accumulate {a.accumulate} --rollout-steps {a.rollout_steps}: "
                        f"for --method dancegrpo the batch must be a multiple of --group {a.group}, the "
                        "others 1 and at least 2")
    if a.resume and a.overwrite:
        raise UserError("--resume --overwrite: go on with the run in --out, or start again; give one")
    plan.check_card(a.card)
    flux.check_folder(a.model)
    flux.check_size(a.model, a.size)
    rewards.parse_rewards(a.reward)
    memory.check(a.lora, a.memory)
    return a


def own_defaults(first):
    """Defaults that suit the model, and what of it is trained: (where they stand, {flag: value})."""
    where, values = flux.defaults_of(first)
    if first.lora:
        values["lr"] = values.get("lora_lr", LORA_LR)
    return where, values


def notes(a):
    """What the flags come to that nobody may have meant: a list of lines."""
    lines = flux.notes(a.model, vars(a))
    if a.threshold is not None and a.form in ("plain", "sgp") and len(a.branches) == 2:
        lines.append(f"--form {a.form} --threshold {a.threshold}: the reward of the inverting branch is that "
                     "of the denoising one with its sign turned, so the threshold stops one of the two at "
                     "most; --threshold off stops neither")
    if a.images is not None:
        lines.append(f"--images {a.images}: captions are the prompts, nothing is rolled out, and every "
                     "photograph gets noise of its own in every update; --prompts, --noise and --rollout-* "
                     "are not read")
    return lines


# ------------------------------------------------------------------------------ one update: Eqs. 3-6 and 9-13
class Term(NamedTuple):
    """One term of Eq. 6's sum, all of it: for the log, and for --explain."""
    prompts: list
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
            weight = da.lam(at.sigma, *a.sigma_range, *a.lam, a.lam_shift)       # [B]
            loss = da.aggregate(sr.loss(r, a.threshold), weight, n).mean()       # Eq. 6
            sgp = sr.relative(f.detach(), batch.C1, batch.C2)
            yield loss, Term(batch.prompts, branch, at.sigma, at.sigma_to, x0, x_t, v_theta, x0_hat, image,
                             f, d, r, sgp)


METHODS = {"srpo": srpo, "refl": baselines.refl, "draft-lv": baselines.draft_lv,
           "dancegrpo": baselines.dancegrpo}


def discount_of(a, branch):
    """The ends of the released discount of a branch: (late, early)."""
    return a.discount_denoise if branch == "denoise" else a.discount_invert


# --------------------------------------------------------------------------------------------------- the loop
def train(a, run, folder, state, stopping):
    """Updates until --steps, with checkpoints; raises Stopped if it is asked to stop. `state` is what a
    checkpoint remembers beside the weights, of the last update that was finished."""
    world = run.world
    net = run.net
    flop = plan.update_flop(prepare.job(a))  # of this process
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
            for loss, term in METHODS[a.method](a, net, run.reward, batch):
                if loss is baselines.STEP:
                    optimizer_step(a, run, folder, step, trouble)
                    continue
                trouble = trouble or first_not_finite(term.prompts, x_t=term.x_t, v_theta=term.v_theta,
                                                      image=term.image, reward=term.reward)
                (loss / a.accumulate).backward()
                numbers.append({f"reward_{term.branch}": term.reward.mean().item(),
                                "sgp": term.sgp.mean().item()})
        norm = optimizer_step(a, run, folder, step, trouble)
        seconds = parallel.clock(net.device) - started
        line = {"step": step, **world.mean(numbers), "grad_norm": norm,
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


def optimizer_step(a, run, folder, step, trouble):
    """Clip, look for what is not finite, step: the gradient's norm before it was clipped."""
    world = run.world
    transformer = run.net.transformer
    parameters = memory.trainable(transformer)
    norm = parallel.full(torch.nn.utils.clip_grad_norm_(parameters, a.clip))
    if norm == 0:
        world.say(f"step {step}: the gradient is 0: " + ("nothing is left to learn" if a.threshold is None
                  else f"every reward is above --threshold {a.threshold}; --threshold off"))
    if trouble is None and not norm.isfinite():
        trouble = Trouble("the gradient", "all its prompts together")
    stop_before_the_step(trouble, step, world, transformer, folder.out / "weights", run.net.dtype)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    stop_after_the_step(parameters, step, folder.out, folder.id, world)
    return norm.item()


def save(a, run, folder, state):
    """Write a checkpoint of the last update that was finished, if there is none yet."""
    if folder.saved != state["step"]:
        state["contents"] = run.contents.result()
        checkpoint.save(folder.out, run.net.transformer, run.optimizer, state, run.world, a.keep)
        folder.saved = state["step"]


def show_plan(a):
    """--plan: what an update would cost, and what fits which card."""
    for note in flux.notes(a.model, vars(a)):
        print(note)
    if a.memory == "auto":
        a.memory = memory.on_a_cpu(a.lora)
    plan.show(prepare.job(a), a.world_size, a.card, a.share)
    cards.show_cards(prepare.job(a), a.share)


def explain_an_update(a, out):
    """--explain: one update of two images, told and drawn."""
    a.steps = 1
    a.batch = min(a.batch, 2)
    a.accumulate = 2 // a.batch
    world = parallel.World(mesh=memory.needs_mesh(a.memory))
    prepare.settle(a, world)
    explain(a, prepare.set_up(a, world), srpo, out)


def main(argv=None):
    """Plan, explain, or train: from the command line (None: the script's own) to the run's folder."""
    with frame("train.py"):
        stopping = Stopping("stopped before the first update: there is nothing to save")
        a = flags(sys.argv[1:] if argv is None else argv)
        out = Path(a.out or f"runs/{Path(a.model).name}")
        if a.plan:
            return show_plan(a)
        if a.explain:
            return explain_an_update(a, out)
        world = parallel.World(a.replicas, mesh=memory.needs_mesh(a.memory))
        prepare.settle(a, world)
        folder = world.decide(RunFolder, out, vars(a), a.batch * a.accumulate * world.size)
        if folder.checkpoints:
            newest = folder.checkpoints[-1].name
            stopping.words = f"stopped before another update; {newest} is there, and --resume continues"
        run = prepare.set_up(a, world, stopping)
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
