"""SRPO: align FLUX.1 with the difference between two prompts (arXiv 2509.06942).

    python train.py --model miniature                                                              on a laptop
    torchrun --nproc_per_node=8 train.py --control "realistic photo" --neg "CG render"             FLUX.1-dev

The mathematics is in direct_align.py (Eqs. 3-6) and srpo_reward.py (Eqs. 7-13); `update` below is one step of
it, and `run` is the loop around it, from top to bottom. Defaults are the released recipe; `--recipe paper`
takes the printed forms.
"""

import json
import os
import signal
import sys
from functools import partial

import torch
from torchvision.io import read_image, write_png
from tqdm import tqdm

import direct_align as da
from evaluation import explain
from engine import old_flags as flags
import flux
from evaluation import metrics
from engine import parallel
from engine import plan
import srpo_reward as sr
from evaluation import tables
from rewards.pictures import save_grid


def first_not_finite(**tensors):
    """(name, row) of the first tensor [B, ...] with a NaN or Inf in it, and of the first such row; None if
    all are fine."""
    for name, t in tensors.items():
        bad = ~t.detach().isfinite().reshape(len(t), -1).all(1)
        if bad.any():
            return name, int(bad.nonzero()[0])


# --------------------------------------------------------------------------------- one update, Eqs. 3-6, 9-13
def update(a, v, decode, image_features, x0, eps, C0, C1, C2, middles):
    """Add the gradient of Eq. 6 to the network's, for B images of clean latents x0 [B, N, C] (no gradient).

    v(x_t, sigma) the network's velocity; decode(x0_hat) pictures; image_features(pictures) f [B, D];
    eps [B, N, C] the noise prior; C0, C1, C2 [B, D] text features of the prompt, with control and with
    negative words; middles a list of n draws [B] (`da.draw_middle`). Returns
    ({branch: mean reward, "sgp": mean f.(C1 - C2)} over the n injections, what was not finite).
    """
    grid, told, trouble = (da.training_grid(*a.sigma_range, a.cells),
                           {b: [] for b in (*a.branches, "sgp")}, None)
    reach, n = da.reach_of(a.groundtruth_ratio, a.cells), len(middles) * len(a.branches)
    for m in middles:  # Eq. 6's sum
        for branch in a.branches:
            at = da.place(branch, m, grid, reach, a.meet)
            sigma, sigma_to = at.sigma.to(x0.device), at.sigma_to.to(x0.device)
            x_t = da.inject(x0, eps, sigma)  # Eq. 3, [B, N, C]
            v_theta = v(x_t, sigma)  # the only call with a gradient
            if a.recover == "velocity":
                x0_hat = da.recover(x_t, v_theta, eps, sigma, sigma_to)  # Eq. 5
            else:
                x0_hat = da.recover_epsilon(x_t, da.epsilon(x_t, v_theta, sigma), eps, sigma, sigma_to)
            image = decode(x0_hat)  # [B, 3, H, W]
            f = image_features(image)  # [B, D]
            d = da.discount(at.cell, *getattr(a, f"discount_{branch}"), a.cells)
            r = sr.branch_reward(a.form, branch, f, C0, C1, C2, d, a.cfg_k)  # Eqs. 12 and 13, [B]
            trouble = trouble or first_not_finite(x0=x0, v_theta=v_theta, image=image, reward=r)
            weight = da.lam(sigma_to, *a.sigma_range, *a.lam)
            da.aggregate(sr.loss(r, a.threshold), weight, n).mean().backward()  # Eq. 6
            told[branch].append(r.mean().item())
            told["sgp"].append(sr.relative(f, C1, C2).mean().item())
    return {k: sum(values) / len(values) for k, values in told.items()}, trouble


def prompt_order(n, count, seed):
    """The first `count` prompts of an endless series of seeded permutations of n: a list of rows."""
    g, rows = torch.Generator().manual_seed(seed), []
    while len(rows) < count:
        rows += torch.randperm(n, generator=g).tolist()
    return rows[:count]


def hacking(now, before, band):
    """The hacking gauge: (drift {statistic: change of the mean}, list of what is wrong, in words).

    now, before: scores {name: [P]} of the same prompts and seeds. A rise or fall counts when it is above two
    standard errors of the paired differences.
    """
    drift = {k: (now[k] - before[k]).mean().item() for k in metrics.STATISTICS}
    wrong = [f"{k} drifted by {drift[k]:+.3f}, outside ±{limit}"
             for k, limit in zip(metrics.STATISTICS, band) if abs(drift[k]) > limit]
    change = {k: now[k] - before[k] for k in ("reward", "sgp")}
    sure = {k: d.mean().abs() > 2 * d.std() / len(d) ** 0.5 for k, d in change.items()}
    if all(sure.values()) and change["reward"].mean() > 0 > change["sgp"].mean():
        wrong.append("the reward rises while the SGP gap falls")
    return drift, wrong


def open_board(out):
    """A TensorBoard writer in out/tensorboard; ValueError if the package is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("--tensorboard: the package is not installed; pip install tensorboard") from error
    return SummaryWriter(out / "tensorboard")


def run():
    try:
        a = flux.parse_flags(flags.parser(__doc__), {"paper": flags.PAPER})
        flags.check(a)
        if a.plan:
            return plan.show(a)
        out, checkpoint = (None, None) if a.explain else flags.run_folder(a)
        flux.needs_gpu(a.model)
        prompts = flux.read_prompts(a.prompts)
        held_out = flux.read_prompts(a.eval_prompts, "--eval-prompts")[:max(a.eval, a.watch)]
        world = parallel.World(a.replicas)
        plan.must_fit(a, world)
        B, everyone = a.batch, a.batch * world.size  # images an update: of this process, of all
        order = prompt_order(len(prompts), a.steps * everyone, a.seed)
        mine = [order[step * everyone:][world.rows(B)] for step in range(a.steps)]  # B rows a step
        used = sorted({row for rows in mine for row in rows})  # only these are encoded
        prompts, mine = [prompts[row] for row in used], [[used.index(row) for row in rows] for rows in mine]
        txt, pooled, cut = flux.encode_prompts(a.model, prompts + held_out, world.device, world.dtype)
        reward, judge = sr.load_rewards(a.reward, world.device), metrics.load_judge(a.model)
        model = flux.load(a.model, None, world.device, world.dtype, world)
        grid = model.grid(a.size, a.size)
        if world.main and not a.explain:
            flags.make_folder(out, a)
        board = open_board(out) if a.tensorboard and world.main else None
    except ValueError as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    say = print if world.main else lambda *words: None
    say(" ".join(f"--{k.replace('_', '-')} {v}" for k, v in vars(a).items()))
    if cut:
        say(f"{cut} of {len(prompts) + len(held_out)} prompts are longer than the text encoder takes; "
            "their end is not seen")
    (txt, txt_held), (pooled, pooled_held) = (t.split([len(prompts), len(held_out)]) for t in (txt, pooled))
    transformer, device, dtype = model.transformer, model.device, model.dtype
    if a.checkpointing and device.type == "cuda":
        transformer.enable_gradient_checkpointing()
    if a.compile:
        for block in [*transformer.transformer_blocks, *transformer.single_transformer_blocks]:
            block.compile()
    optimizer = torch.optim.AdamW(transformer.parameters(), a.lr, (0.9, 0.999), weight_decay=a.weight_decay,
                                  fused=device.type == "cuda")
    sigmas = da.sigma_steps(a.rollout_steps, a.shift or model.shift(grid[0] * grid[1]))
    shape = (grid[0] * grid[1], transformer.config.in_channels)
    # FLOP of an update of this process
    work = B * sum(plan.update_flop(transformer.config, shape[0], txt.shape[1], a))
    if a.explain:
        explain.tell_everything(reward)

    def look(n, desc):
        """Pictures [n, 3, H, W] of the first n held-out prompts at fixed seeds, and their scores; the
        processes share the work, and all get the whole."""
        n = min(n, len(held_out))
        each = -(-n // world.size)
        rows = [min(i, n - 1) for i in range(each * world.size)][world.rows(each)]
        bar = partial(tqdm, desc=desc, leave=False) if n > 64 and world.main else list
        with parallel.gathered(transformer):
            images = flux.sample(model, txt_held[rows], pooled_held[rows], flux.noise(model, grid, rows),
                                 grid, a.eval_steps, a.guidance, B, bar)
        scores = metrics.measure(images, [held_out[r] for r in rows], reward, judge, a.control[0], a.neg[0])
        parts = world.gather((images, scores))
        return (torch.cat([p for p, _ in parts])[:n],
                {k: torch.cat([s[k] for _, s in parts])[:n] for k in scores})

    asked_to_stop = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked_to_stop.append(True))
    state = {"step": 0, "best": None, "before": None, "evaluated": None}
    if checkpoint:
        state = parallel.load(checkpoint, transformer, optimizer)
        if world.main:
            kept = [s for s in (out / "log.jsonl").read_text().splitlines()
                    if json.loads(s)["step"] <= state["step"]]
            (out / "log.jsonl").write_text("".join(line + "\n" for line in kept))
    elif not a.explain:
        images, scores = look(a.watch, "watch")
        state["before"] = {k: v.tolist() for k, v in scores.items()}
        state["evaluated"] = tables.summary(look(a.eval, "evaluate before")[1]) if a.eval else None
        if world.main:
            save_grid(images, out / "samples" / "step_00000.png")
    before = {k: torch.tensor(v) for k, v in (state["before"] or {}).items()}
    log = open(out / "log.jsonl", "a") if world.main and not a.explain else None

    # ----------------------------------------------------------------------------------------------- the loop
    bar = tqdm(range(state["step"] + 1, a.steps + 1), initial=state["step"], total=a.steps, desc="train",
               disable=a.explain or not world.main)
    for step in bar:
        clock = parallel.clock(device)
        # all of a step's chance comes from its number
        g = torch.Generator().manual_seed(a.seed * 1_000_003 + step)
        rows = mine[step - 1]
        texts = [prompts[r] for r in rows]
        c, p = txt[rows].to(device, dtype), pooled[rows].to(device, dtype)  # [B, L, D], [B, D']
        v = lambda guidance: lambda x, s: flux.velocity(transformer, x.to(dtype), s, c, p,
                                                        guidance, grid).float()
        one_for_all = lambda: torch.randn(1, *shape, generator=g).expand(B, *shape).to(device)
        one_each = lambda: torch.randn(everyone, *shape, generator=g)[world.rows(B)].to(device)
        eps = one_each() if a.noise == "independent" else one_for_all()  # [B, N, C]
        with torch.no_grad(), parallel.gathered(transformer):
            x0 = flux.rollout(v(a.rollout_guidance), eps, sigmas)  # [B, N, C]
        if a.noise == "fresh":
            eps = one_for_all()
        rolled = parallel.clock(device) - clock

        control, neg = a.control[step % len(a.control)], a.neg[step % len(a.neg)]
        C0, C1, C2 = reward.conditions(texts, control, neg)  # [B, D] each
        middles = [da.draw_middle(everyone, a.cells, g)[world.rows(B)] for _ in range(a.injections)]
        told, trouble = update(a, v(a.guidance), lambda z: flux.decode(model.vae, z, grid),
                               reward.image_features, x0, eps, C0, C1, C2, middles)
        norm = parallel.whole(torch.nn.utils.clip_grad_norm_(transformer.parameters(), a.clip))
        if norm == 0 and world.main:
            tqdm.write(f"step {step}: the gradient is 0: every reward is above --threshold {a.threshold}; "
                       f"--threshold off")
        trouble = trouble or first_not_finite(gradient=norm.view(1))
        reports = world.gather((told, trouble and (*trouble, texts), bool(asked_to_stop)))
        for what, row, whose in [t for _, t, _ in reports if t][:1]:
            where = (f"the {len(whose)} prompts from {whose[0]!r}" if what == "gradient"
                     else f"prompt {whose[row]!r}")
            if world.main:
                print(f"\ntrain.py: step {step}, {where}: {what} is not finite; the weights of "
                      f"step {step - 1} are kept. Try a smaller --lr, or another --seed.", file=sys.stderr)
            if not a.explain:
                parallel.export(transformer, out / "weights", world, dtype)
            sys.exit(1)
        if a.explain:
            return say(f"\ngradient norm {norm:.4g}, clipped to {a.clip}; "
                       f"then AdamW with lr {a.lr} would step.")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        told = {k: sum(t[k] for t, _, _ in reports) / world.size for k in told}
        seconds = parallel.clock(device) - clock
        line = {"step": step, **{k if k == "sgp" else f"reward_{k}": x for k, x in told.items()},
                "grad_norm": norm.item(), "seconds_rollout": round(rolled, 3),
                "seconds_update": round(seconds - rolled, 3), **plan.achieved(work, seconds, device)}

        if step % a.watch_every == 0 or step == a.steps:
            images, now = look(a.watch, "watch")
            drift, wrong = hacking(now, before, a.drift_band)
            line |= {"drift": drift, "watch": {k: s and s["mean"] for k, s in tables.summary(now).items()},
                     "hacking": wrong}
            for w in wrong if world.main else []:
                tqdm.write(f"step {step}: {w}")
            if not wrong and (state["best"] is None or now["sgp"].mean().item() > state["best"]):
                state["best"] = now["sgp"].mean().item()
                parallel.export(transformer, out / "weights_best", world, dtype)
            bar.set_postfix(sgp=f"{now['sgp'].mean():+.3f}", hacking="YES" if wrong else "no")
            if world.main:
                save_grid(images, out / "samples" / f"step_{step:05d}.png")
        if world.main:
            log.write(json.dumps(line) + "\n")
            log.flush()
        if board:
            for k, x in {**line, **line.get("drift", {})}.items():
                if isinstance(x, (int, float)):
                    board.add_scalar(k, x, step)
        stop = any(s for _, _, s in reports)
        if step % a.save_every == 0 or step == a.steps or stop:
            state["step"] = step
            parallel.save(out, transformer, optimizer, state, world, a.keep)
        if stop:
            say(f"\nstopped after step {step}, saved; --resume continues")
            return world.close()

    # -------------------------------------------------------------------------------------------- the results
    parallel.export(transformer, out / "weights", world, dtype)
    after = tables.summary(look(a.eval, "evaluate after")[1]) if a.eval else None
    world.close()
    if not world.main:
        return
    samples = sorted((out / "samples").glob("step_*.png"))
    write_png(torch.cat([read_image(str(samples[i])) for i in (0, -1)], 1), str(out / "before_after.png"))
    result = {"steps": a.steps, "best_sgp": state["best"], "before": state["evaluated"], "after": after}
    (out / "summary.json").write_text(json.dumps(result, indent=2) + "\n")
    if a.eval:
        print(tables.table({"before": result["before"], "after": after}))
    print(f"weights in {out}/weights (best by SGP gap inside the drift band: weights_best), "
          f"pictures in {out}/before_after.png")


def main():
    try:
        run()
    except OSError as error:  # a full or vanished disk: the checkpoint before stays
        print(f"\ntrain.py: {error}", file=sys.stderr)
        sys.exit(1)
    except RuntimeError as error:
        if not parallel.is_anothers_end(error):
            raise
        sys.exit(1)  # the process that failed has said why


if __name__ == "__main__":
    main()
