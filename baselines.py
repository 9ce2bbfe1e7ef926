"""What the paper compares SRPO with: ReFL (Eq. 2), DRaFT-LV (Eq. 1) and DanceGRPO. Each is a generator of loss terms
like `train.srpo`, and is trained by the same loop.

They climb the plain reward of the bare prompt, r0 (Eq. 7). With another --form they climb its denoising column in
srpo_reward.branch_reward. Symbols as in direct_align.py; a step goes from the noise level s to s_next < s, and
d = s - s_next. B images, N tokens, C channels. How often each calls the network is in recipe.METHODS. Table 1's row
"Direct-Align" needs no code of its own: it is `train.srpo` with --recipe direct-align.
"""

from typing import NamedTuple

import torch

import direct_align as da
import srpo_reward as sr
from engine.memory.parallel import moved
from recipe import DANCE_OPTIMIZER_STEPS, DRAFT_EXTRA, transitions_kept

STEP = "step"  # yielded in place of a loss: the optimizer steps now, and not only at the end of the update

ETA = 0.3          # DanceGRPO: noise of its SDE
RATIO_BAND = 1e-4  # DanceGRPO: the probability ratio is clipped to 1 +- this
LARGEST_ADVANTAGE = 5.0


class Term(NamedTuple):
    """What is known of a loss term. It is read by the log, by the check for NaN, and by --explain (srpo's alone)."""
    prompts: list
    branch: str                    # "denoise" or "invert"; the method's name
    x_t: torch.Tensor              # [B, N, C] what the network was called with
    v_theta: torch.Tensor          # [B, N, C], with gradient
    image: torch.Tensor = None     # [B, 3, H, W], with gradient
    reward: torch.Tensor = None    # [B], with gradient
    sgp: torch.Tensor = None       # [B] r1 - r2, the SGP gap, for the log; None: a text would have to be scored for it
    sigma: torch.Tensor = None     # [B] where srpo calls the network
    sigma_to: torch.Tensor = None  # [B] where it lands
    x0: torch.Tensor = None        # [B, N, C]
    x0_hat: torch.Tensor = None    # [B, N, C], with gradient
    d: torch.Tensor = None         # [B] the released discount


def sampling_levels(a, net, batch):
    """The rollout's noise levels, from 1 to 0: [S + 1]."""
    return da.sigma_steps(a.rollout_steps, a.shift or net.shift(batch.start.shape[1], a.rollout_steps))


def one_step(net, x, s, c, guidance):
    """Eq. 2's prediction for a velocity:  x0_hat = x - s v_theta(x, s).

    x [B, N, C], held fixed: no gradient passes into it; s a number in [0, 1]. Returns (x0_hat, v_theta), both
    [B, N, C] with gradient. The paper writes (x - sigma eps_theta) / alpha, which is the same for
    eps_theta = x + alpha v_theta.
    """
    v_theta = net.velocity(x.detach(), s, c, guidance)
    return x.detach() - s * v_theta, v_theta


def rewarded(a, net, reward, batch, x0_hat):
    """(image [B, 3, H, W], r [B], SGP gap [B]) of recovered latents [B, N, C]. image and r have a gradient. The gap is
    None if a text would have to be scored for it that r does not need.

    r is that of --form in a denoising branch. The released form's d is the middle of its range, because there is no
    training grid that it could depend on.
    """
    image = net.decode(x0_hat, batch.c.grid)
    r0, r1, r2 = reward.of(image, batch.texts)
    d = image.new_full((), sum(a.discount_denoise) / 2, dtype=torch.float32)
    r = sr.branch_reward(a.form, "denoise", r0, r1, r2, d, a.cfg_k).value()
    return image, r, sr.relative(r1, r2).known()


# ---------------------------------------------------------------------------------------------- Eq. 2: ReFL
def refl(a, net, reward, batch):
    """ReFL (Eq. 2, arXiv 2304.05977):  r = R(x_k - s_k v_theta(x_k, s_k)), at one of the last steps k.

    Yields one (loss, `Term`): mean of -r, or of relu(threshold - r). k ~ U{1, ..., --refl-steps} steps are
    left when the rollout stops. Only the call after it has a gradient. Differs from the original (Stable Diffusion, the
    last 10 of 40 steps): a velocity, FLUX's levels, and no factor of 1e-3, which changes nothing under AdamW.
    """
    levels = sampling_levels(a, net, batch)
    k = batch.chance.whole(1, min(a.refl_steps, a.rollout_steps))
    to_k = levels[:len(levels) - k]
    x = net.rollout(batch.start, batch.c, to_k, a.rollout_guidance, dtype=a.rollout_dtype)  # at levels[-1 - k]
    s = levels[-1 - k].item()
    x0_hat, v_theta = one_step(net, x, s, batch.c, a.guidance)
    image, r, sgp = rewarded(a, net, reward, batch, x0_hat)
    yield sr.loss(r, a.threshold).mean(), Term(batch.prompts, "refl", x, v_theta, image, r, sgp)


# ------------------------------------------------------------------------------------------ Eq. 1: DRaFT-LV
def draft_lv(a, net, reward, batch):
    """DRaFT-LV (Eq. 1, arXiv 2309.17400): the last step with a gradient, and again from n fresh noises.

        x0_hat = x - s v_theta(x, s),  s the last level before 0
        x_i = (1 - s) x0_hat + s eps_i,  x0_hat_i = x_i - s v_theta(x_i, s),  i = 1 ... n, x_i held fixed

    Yields 1 + n times (loss, `Term`), each a (1 + n)-th of the mean of -r; n is 2, as published. For one step, sample()
    of Eq. 1 is Eq. 2 with k = 1. So n = 0 would give `refl` with k = 1, to the bit.
    """
    levels = sampling_levels(a, net, batch)
    s = levels[-2].item()
    x = net.rollout(batch.start, batch.c, levels[:-1], a.rollout_guidance, dtype=a.rollout_dtype)
    x0 = None
    for _ in range(1 + DRAFT_EXTRA):
        if x0 is not None:
            eps = moved(batch.chance.normal(*x0.shape[1:]), x0.device)
            x = da.inject(x0, eps, s)
        x0_hat, v_theta = one_step(net, x, s, batch.c, a.guidance)
        if x0 is None:
            x0 = x0_hat.detach()
        image, r, sgp = rewarded(a, net, reward, batch, x0_hat)
        loss = sr.loss(r, a.threshold).mean() / (1 + DRAFT_EXTRA)
        yield loss, Term(batch.prompts, "draft-lv", x, v_theta, image, r, sgp)


# ------------------------------------------------------------------------------------------------ DanceGRPO
class Transition(NamedTuple):
    """One step of a stochastic rollout, for B images; or one step of each image, and then s and s_next are [B]."""
    s: torch.Tensor
    s_next: torch.Tensor
    x: torch.Tensor        # [B, N, C]
    x_next: torch.Tensor   # [B, N, C]
    logp: torch.Tensor     # [B] under the policy that made it


def sde_mean(x, v, s, s_next):
    """The mean of a step of DanceGRPO's SDE:  mu = x - d v - (eta^2 d / 2s) eps_hat,  eps_hat = x + (1-s) v.

    x, v [B, N, C]; s, s_next numbers or [B], 0 < s <= 1. The score -eps_hat / s turns the ODE into an SDE with the
    same marginals, for any eta.
    """
    s = da.column(s, x)
    d = s - da.column(s_next, x)
    return x - d * v - ETA**2 * d / (2 * s) * da.epsilon(x, v, s)


def log_probability(x_next, mean, s, s_next):
    """log p(x_next | x) up to a constant, [B]: the mean of -(x_next - mean)^2 / (2 eta^2 d) over an image's numbers, as
    in DanceGRPO's released code; the definition has their sum. s, s_next: numbers or [B]."""
    return -((x_next - mean) ** 2).mean((1, 2)) / (2 * ETA**2 * (s - s_next))


def advantages(r, group):
    """How much better an image is than its group: (r - mean) / std of each `group` images in turn, within
    +-5. r [B], B a multiple of group. Returns [B]."""
    groups = r.view(-1, group)
    spread = groups.std(1, keepdim=True) + 1e-8
    return ((groups - groups.mean(1, keepdim=True)) / spread).view(-1).clamp(-LARGEST_ADVANTAGE,
                                                                             LARGEST_ADVANTAGE)


def clipped_loss(ratio, advantage):
    """PPO's loss, [B]:  max(-A rho, -A clip(rho, 1 +- 1e-4))."""
    clipped = ratio.clamp(1 - RATIO_BAND, 1 + RATIO_BAND)
    return torch.maximum(-advantage * ratio, -advantage * clipped)


def stochastic_rollout(a, net, batch):
    """Noise to clean latents by the SDE, without gradient: (x0 [B, N, C], a `Transition` for every step but the last).
    The last step is deterministic, because its noise would be seen in the picture."""
    levels = sampling_levels(a, net, batch).tolist()
    path = []

    def step(x, v, s, s_next):
        """For `flow.Flow.rollout`: a step of the SDE, noted in the path; the last one is Euler's."""
        if s_next == 0:
            return x - s * v
        mean = sde_mean(x, v, s, s_next)
        noise = moved(batch.chance.normal(*x.shape[1:]), x.device)
        x_next = mean + ETA * (s - s_next) ** 0.5 * noise
        path.append(Transition(s, s_next, x, x_next, log_probability(x_next, mean, s, s_next)))
        return x_next

    start = batch.start[::a.group].repeat_interleave(a.group, 0)  # one initial noise for a group
    x0 = net.rollout(start, batch.c, torch.tensor(levels), a.rollout_guidance, step)
    return x0, path


def chosen(path, numbers, rows):
    """One `Transition` of B images. Its image i is that of row rows[i] at step numbers[i]; numbers, rows: B whole
    numbers each."""
    steps = [path[number] for number in numbers]
    pick = list(zip(steps, rows, strict=True))
    s = moved(torch.tensor([step.s for step in steps]), path[0].x.device)
    s_next = moved(torch.tensor([step.s_next for step in steps]), path[0].x.device)
    return Transition(s, s_next, torch.stack([step.x[row] for step, row in pick]),
                      torch.stack([step.x_next[row] for step, row in pick]),
                      torch.stack([step.logp[row] for step, row in pick]))


def dancegrpo(a, net, reward, batch):
    """DanceGRPO (arXiv 2505.07818): without the reward's gradient. An image's transitions become more probable if its
    reward is above the mean of its group, the --group images of one prompt.

    Yields (loss, `Term`) for every part of the images and every transition that is trained, and `STEP` between the
    parts: three optimizer steps a rollout, as released (fewer with fewer images). Each image draws its own 60 %
    of the transitions, as released. rho = exp(logp - logp_old); the loss is PPO's clipped one; no KL. Differs from the
    release: a part is one batch, not image by image, which gives the same sum.
    """
    x0, path = stochastic_rollout(a, net, batch)
    with torch.no_grad():
        image, r, sgp = rewarded(a, net, reward, batch, x0)
    A = advantages(r, a.group).to(x0.device)
    n = transitions_kept(a.rollout_steps)
    kept = batch.chance.some_each(len(path), n)  # [B, n]
    parts = torch.arange(len(r)).tensor_split(min(DANCE_OPTIMIZER_STEPS, len(r)))
    for number, part in enumerate(parts):
        rows = slice(part[0].item(), part[-1].item() + 1)  # indices would be copied to the GPU for every tensor
        c = batch.c.rows(rows)
        prompts = batch.prompts[rows]
        for k in range(n):
            was = chosen(path, kept[rows, k].tolist(), part.tolist())
            v_theta = net.velocity(was.x, was.s, c, a.rollout_guidance)        # [B / 3, N, C]
            mean = sde_mean(was.x, v_theta, was.s, was.s_next)
            logp = log_probability(was.x_next, mean, was.s, was.s_next)        # [B / 3]
            ratio = torch.exp(logp - was.logp)
            loss = clipped_loss(ratio, A[rows]).mean() / n
            yield loss, Term(prompts, "dancegrpo", was.x, v_theta, image[rows], r[rows],
                             None if sgp is None else sgp[rows])
        if number < len(parts) - 1:
            yield STEP, None
