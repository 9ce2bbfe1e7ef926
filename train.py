"""SRPO: align FLUX.1 with the difference between two prompts (arXiv 2509.06942).

    python train.py --model miniature                                                              on a laptop
    torchrun --nproc_per_node=8 train.py --control "realistic photo" --neg "CG render"             FLUX.1-dev

From top to bottom: `srpo`, the loss of one update; `update`, one update; `train`, the loop. The other files:

    direct_align.py, srpo_reward.py    Eqs. 3-6, and Eqs. 7-13
    recipe.py                          every hyper-parameter, with its source; command.py reads the command line
    baselines.py                       the methods that the paper compares with (--method), Eqs. 1-2
    prepare.py                         the set-up, and the batches of an update
"""

import sys

from engine.loading import until_loaded

if __name__ == "__main__":
    until_loaded("train.py")

import command
from engine.errors import frame

if __name__ == "__main__":
    with frame("train.py"):
        answered = command.read(sys.argv[1:])  # -h and wrong flags end here, before torch is imported
    until_loaded("train.py")


import torch
from tqdm import tqdm

import direct_align as da
import prepare
import srpo_reward as sr
from baselines import STEP, Term, sampling_levels
from engine import hub
from engine.errors import NotFinite, Stopped, printable
from engine.memory import cards, counts, layouts, modes, parallel, shown, whole_run, work
from engine.memory.one_call import Calls
from engine.model import lora, tensors
from engine.run import checkpoint, finite
from engine.run.folder import RunFolder, may_explain
from evaluation import card, watch
from evaluation.explain import Explanation


# ------------------------------------------------------------------------------ one update: Eqs. 3-6 and 9-13
def srpo(a, net, reward, batch):
    """SRPO: yields (loss, `Term`) for every term of Eq. 6's sum, whose gradients add up at constant memory.

    a: the flags; net: a `flow.Flow`; reward: a `srpo_reward.Rewards`; batch: a `prepare.Batch`. The caller calls
    backward on each loss as it comes, and takes all of them: after the last one, `Calls` may finish the backward.
    """
    x0 = batch.x0
    if x0 is None:
        levels = sampling_levels(a, net, batch)
        x0 = net.rollout(batch.start, batch.c, levels, a.rollout_guidance, dtype=a.rollout_dtype)  # [B, N, C]
    grid = da.training_grid(*a.sigma_range, a.cells, x0.device)                  # the noise levels, noisiest first
    reach = da.reach_of(a.groundtruth_ratio, a.cells)                            # Eq. 5's Delta sigma, in cells of it
    n = a.injections * len(a.branches)
    for m in batch.middles:                                                      # [B] cells, once an injection
        states = []
        for branch in a.branches:
            at = da.place(branch, m, grid, reach, a.meet)
            x_t = da.inject(x0, batch.eps, at.sigma)                             # Eq. 3
            states.append((branch, at, x_t))
        calls = Calls(net, [(x_t, at.sigma) for _, at, x_t in states])
        for branch, at, x_t in states:
            v_theta = calls.velocity(x_t, at.sigma, batch.c, a.guidance)         # the call with a gradient
            if a.recover == "velocity":
                x0_hat = da.recover(x_t, v_theta, batch.eps, at.sigma, at.sigma_to)  # Eq. 5
            else:
                eps_theta = da.epsilon(x_t, v_theta, at.sigma)
                x0_hat = da.recover_epsilon(x_t, eps_theta, batch.eps, at.sigma, at.sigma_to)  # as printed
            image = net.decode(x0_hat, batch.c.grid)                             # [B, 3, H, W]
            r0, r1, r2 = reward.of(image, batch.texts)                           # Eq. 7 for three texts
            late, early = a.discount_denoise if branch == "denoise" else a.discount_invert
            d = da.discount(at.cell, late, early, a.cells)                       # [B]
            r = sr.branch_reward(a.form, branch, r0, r1, r2, d, a.cfg_k).value()  # Eqs. 8-13, [B]
            if a.lam_at == "call":
                weight = da.lam(at.sigma, *a.sigma_range, *a.lam, a.lam_shift)   # [B]
            else:
                weight = da.lam_landing(at.sigma_to, *a.sigma_range, a.cells, *a.lam, a.lam_shift)
            loss = da.aggregate(sr.loss(r, a.threshold), weight, n).mean()       # Eq. 6
            sgp = sr.relative(r1, r2).known()
            yield loss, Term(batch.prompts, branch, x_t, v_theta, image, r, sgp,
                             at.sigma, at.sigma_to, x0, x0_hat, d)
        calls.backward()


# ------------------------------------------------------------------------------------------------- one update
def update(a, run, step, batches=None, listener=None):
    """One update: backward on every loss as it comes, the mean gradient of --global-batch images, one step of AdamW.
    The loop below, --explain, the benchmark and the experiments all call it.

    run: a `prepare.Run`; batches: used in place of the run's own; listener: has begin(batch), and before(term) and
    after(loss, term), which are called around each backward. Returns the update's line of the log, a dict.
    Raises NotFinite and Stopped.
    """
    net = run.net
    net.rollouts = []
    began = parallel.mark(net.device)
    numbers = []
    checks = []  # of finite numbers; none is read from the GPU before the step
    for batch in batches or run.batches(a, step):
        if listener is not None:
            listener.begin(batch)
        for loss, term in run.losses(a, net, run.reward, batch):
            if loss is STEP:
                optimizer_step(a, run, step, checks)
                checks = []
                continue
            checks.append(finite.check(term))
            if listener is not None:
                listener.before(term)
            (loss / run.share.accumulate).backward()
            if listener is not None:
                listener.after(loss, term)
            numbers.append(numbers_of(term))
    computed = parallel.mark(net.device)
    norm = optimizer_step(a, run, step, checks)
    done = parallel.mark(net.device)
    seconds = parallel.seconds_between(began, done)
    rollout = sum(parallel.seconds_between(*marks) for marks in net.rollouts)
    return {"step": step, **run.world.mean(read_numbers(numbers)), "grad_norm": norm,
            "seconds_rollout": round(rollout, 3), "seconds_update": round(seconds - rollout, 3),
            "seconds_optimizer": round(parallel.seconds_between(computed, done), 3),
            "images_per_second": round(a.global_batch / seconds, 3)}


def numbers_of(term):
    """The numbers of a `Term` in the log, as tensors; none for a term without a reward."""
    if term.reward is None:
        return {}
    found = {f"reward_{term.branch}": term.reward.detach().mean()}
    return found if term.sgp is None else found | {"sgp": term.sgp.mean()}


def read_numbers(numbers):
    """A list of {name: tensor} as one of {name: number}, read from the GPU at once."""
    values = iter(tensors.read([tensor for each in numbers for tensor in each.values()]))
    return [{name: next(values)[0] for name in each} for each in numbers]


def optimizer_step(a, run, step, checks):
    """Clip the gradient, check that it and the terms' `checks` are finite, step. Returns the norm before clipping.
    Raises NotFinite."""
    parameters = layouts.trainable(run.net.transformer)
    layouts.finish_gradients(run.net.transformer)
    norm = tensors.full(torch.nn.utils.clip_grad_norm_(parameters, a.clip))
    norm = finite.stop_before_the_step(checks, norm, step, run)
    if norm == 0:
        run.world.say(f"step {step}: the gradient is 0: " + ("nothing is left to learn" if a.threshold is None
                      else f"every reward is above --threshold {a.threshold}; --threshold off"))
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    finite.stop_after_the_step(parameters, step, run)
    return norm


# --------------------------------------------------------------------------------------------------- the loop
def train(a, run, state):
    """Updates until --steps, or until the watched pictures reach the gap of --land, with checkpoints. `state` is what a
    checkpoint holds beside tensors, such as the last finished update. Raises Stopped if the run is asked to stop."""
    flop = work.update_flop(run.job, run.world.size)  # of this process
    bar = tqdm(range(state["step"] + 1, a.steps + 1), initial=state["step"], total=a.steps, desc="train",
               disable=not run.world.main)
    for step in bar:
        if run.watched.landed(state):
            break
        for group in run.optimizer.param_groups:
            group["lr"] = run.watched.lr(state)
        line = update(a, run, step)
        seconds = line["seconds_rollout"] + line["seconds_update"]
        line |= work.achieved(flop, seconds, run.net.device) | run.curriculum.says(step)
        line["lr"] = run.watched.lr(state)
        state |= {"step": step, "unlogged": line}
        run.stopping.words = f"stopped after step {step}, saved; --resume continues"
        run.watched.log(run.folder, state)
        if "watch" in line:
            hacked = "YES" if line["hacking"] else "no"
            bar.set_postfix(sgp=f"{line['watch']['sgp']:+.3f}", hacking=hacked)
        if step % a.save_every == 0:
            save(a, run, state)
    save(a, run, state)


def save(a, run, state):
    """Write a checkpoint of the last finished update, unless there is one."""
    folder = run.folder
    if folder.saved != state["step"]:
        state["contents"] = run.contents.result()
        checkpoint.save(folder.out, run.net.transformer, run.optimizer, state, run.world, a.keep)
        folder.saved = state["step"]


def begin(a, run, world):
    """The state from which a run goes on. It is that of the newest checkpoint. Without one, the watched pictures are
    sampled and scored before training. Nothing is written before every comparison with the checkpoint has passed.
    Raises UserError."""
    folder = run.folder
    run.watched.flags = command.as_line(a)
    world.say(run.watched.flags)
    for note in command.notes(a, run.model):
        world.say(note)
    world.decide(folder.take)
    if not folder.checkpoints:
        if a.resume:
            world.say(f"--resume: no checkpoint in {folder.out}; the run starts from the beginning")
        world.decide(folder.open, run.made_by)
        world.decide(run.contents.begin)
        return run.watched.begin(folder)
    state = checkpoint.load_newest(folder.checkpoints, run.net.transformer, run.optimizer, world, watch.STATE)
    world.decide(run.contents.compare, state["contents"])
    world.decide(folder.open, run.made_by)
    world.decide(folder.go_on_from, state)
    if state["unlogged"] is not None:
        run.watched.log(folder, state)
    return state


def show_plan(a, model):
    """--plan: what an update would cost, and what fits which card."""
    for note in command.notes(a, model):
        print(note)
    prepare.share_of(a, a.world_size)
    prepare.settle_evaluation(a, model, print)
    counted = counts.count(prepare.job(a, model), torch.bfloat16)
    a.memory, why = cards.settle_for(prepare.job(a, model), counted, a.world_size, a.card)
    if why:
        print(printable(why))
    job = prepare.job(a, model)
    shown.show(job, counted, a.world_size, a.card, a.share)
    print(whole_run.told(job, a, model, counted, torch.bfloat16))
    cards.show_cards(job, counted, a.share)


def explain_an_update(a, model, out):
    """--explain: one update of two images, told and drawn; out/explain.png is all that is written. Raises UserError."""
    picture = may_explain(out)
    a.steps = 1
    a.global_batch = 2
    a.eval = 0
    world = parallel.World(mesh=modes.needs_mesh(a.memory))
    prepare.settle(a, model, world)
    explanation = Explanation(a, prepare.set_up(a, model, world))
    explanation.close(update(a, explanation.run, 1, listener=explanation), picture)


def main(argv=None, read=None):
    """Plan, explain, or train. argv: the flags, a list (None: those of the process); read: what `command.read` returned
    for them, if it was called before."""
    with frame("train.py", "stopped before the first update: there is nothing to save") as stopping:
        a, model = read or command.read(sys.argv[1:] if argv is None else argv)
        out = command.out_of(a.out, a.model)
        if a.plan:
            return show_plan(a, model)
        if a.explain:
            return explain_an_update(a, model, out)
        world = parallel.World(a.replicas, mesh=modes.needs_mesh(a.memory))
        prepare.share_of(a, world.size)
        prepare.settle(a, model, world)
        if a.push_to_hub:
            world.decide(hub.may_push, a.push_to_hub)
        folder = world.decide(RunFolder, out, vars(a))
        if folder.checkpoints:
            newest = folder.checkpoints[-1].name
            stopping.words = f"stopped before another update; {newest} is there, and --resume continues"
        run = prepare.set_up(a, model, world, folder, stopping)
        stopping.later(stopping.words)
        state = begin(a, run, world)
        folder.saved = state["step"]
        try:
            train(a, run, state)
        except Stopped:
            save(a, run, state)
            if state["step"]:
                lora.export(run.net.transformer, out / "weights", world, run.net.dtype, run.watched.about)
            if world.main:
                run.watched.report(folder, state, "stopped")
                if state["step"]:
                    run.watched.cards(out, state)
            raise
        except NotFinite:
            if world.main:
                run.watched.report(folder, state, "failed")
            raise
        lora.export(run.net.transformer, out / "weights", world, run.net.dtype, run.watched.about)
        if a.save_as:
            lora.save_as(run.net.transformer, out / "weights" / f"{a.save_as}.safetensors", world, a.save_as,
                         run.watched.about)
        stopping.words = f"stopped after the last update; its weights are in {out}/weights"
        run.watched.finish(folder, state)
        world.close()
        if a.push_to_hub and world.main:
            stopping.words = f"stopped before {a.push_to_hub} was complete; everything is in {out}"
            hub.push(a.push_to_hub, out / "weights", card.files(out / "weights"))


if __name__ == "__main__":
    import train as script  # under the name by which recipe.METHODS knows it

    script.main(read=answered)
