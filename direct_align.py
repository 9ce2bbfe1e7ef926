"""Direct-Align: section 3.1 of the paper (arXiv 2509.06942), Eqs. 3-6, as pure tensor functions.

Symbols, the paper's:

    x0, x_t, x0_hat       the clean latent, the noisy one, and the recovered one, [B, N, C]
    eps                   the noise prior: Gaussian, and known, [B, N, C]
    sigma                 the noise level in [0, 1], a float or a tensor [B]; alpha = 1 - sigma
    v_theta, eps_theta    the network's velocity, and the noise that it implies, [B, N, C]

FLUX is a rectified flow: x_t = (1 - sigma) x0 + sigma eps. The network predicts the velocity v = eps - x0. So an Euler
step from sigma to sigma_to adds (sigma_to - sigma) v.
"""

from dataclasses import dataclass

import torch


def column(sigma, x):
    """sigma as it multiplies x: a float stays, [B] becomes [B, 1, 1]."""
    return sigma.to(x).view(-1, *[1] * (x.ndim - 1)) if torch.is_tensor(sigma) and sigma.ndim else sigma


# ------------------------------------------------------------------------------------------------ Eqs. 3 to 5
def inject(x0, eps, sigma):
    """Eq. 3:  x_t = alpha x0 + sigma eps,  alpha = 1 - sigma.

    x0, eps [B, N, C]; sigma in [0, 1]. Returns x_t [B, N, C]. As in the paper.
    """
    sigma = column(sigma, x0)
    return (1 - sigma) * x0 + sigma * eps


def recover_exact(x_t, eps, sigma):
    """Eq. 4:  x0 = (x_t - sigma eps) / alpha.

    The closed form that needs no network: x_t, eps [B, N, C]; sigma in [0, 1). Returns x0. As in the paper.
    """
    sigma = column(sigma, x_t)
    return (x_t - sigma * eps) / (1 - sigma)


def recover(x_t, v_theta, eps, sigma, sigma_to):
    """Eq. 5 for a velocity:  x0_hat = (x_t + (sigma_to - sigma) v_theta - sigma_to eps) / (1 - sigma_to).

    One Euler step of the network to sigma_to; the known noise gives the rest of the way to x0. The denoising branch has
    sigma_to < sigma (Eq. 12), and the inverting branch sigma_to > sigma (Eq. 13). So the network's error has the other
    sign there:
        x0_hat = x0 + (sigma_to - sigma) / (1 - sigma_to) * (v_theta - (eps - x0)).
    All tensors [B, N, C]; sigma in [0, 1], sigma_to in [0, 1). Differs from the paper, which divides by alpha at the
    level of the call. That is right for an epsilon (`recover_epsilon`), and wrong for a velocity. The released code
    does the same as this function.
    """
    sigma, sigma_to = column(sigma, x_t), column(sigma_to, x_t)
    return (x_t + (sigma_to - sigma) * v_theta - sigma_to * eps) / (1 - sigma_to)


def recover_epsilon(x_t, eps_theta, eps, sigma, sigma_to):
    """Eq. 5:  x0_hat = (x_t - dsigma eps_theta - (sigma - dsigma) eps) / alpha,  dsigma = sigma - sigma_to.

    As in the paper: alpha = 1 - sigma, at the level of the call. All tensors [B, N, C]; sigma in [0, 1), sigma_to in
    [0, 1]. With eps_theta = `epsilon(x_t, v_theta, sigma)` it is exact for a perfect network, like `recover`. The
    network's error counts less than in `recover`, by the factor 1 - sigma_to: a quarter at 0.75, a 28th at 0.964.
    """
    sigma, sigma_to = column(sigma, x_t), column(sigma_to, x_t)
    dsigma = sigma - sigma_to
    return (x_t - dsigma * eps_theta - (sigma - dsigma) * eps) / (1 - sigma)


def epsilon(x_t, v_theta, sigma):
    """eps_theta = x_t + (1 - sigma) v_theta: the noise that a velocity implies. All [B, N, C];
    sigma in [0, 1]."""
    return x_t + (1 - column(sigma, x_t)) * v_theta


# ---------------------------------------------------------------------------------------------- the schedules
def shift(u, a):
    """shift(u, a) = a u / (1 + (a - 1) u): the time shift of FLUX's schedules; u in [0, 1], a > 0
    (1: no shift)."""
    return a * u / (1 + (a - 1) * u)


def sigma_steps(steps, a):
    """The steps + 1 noise levels of an Euler rollout, from 1 to 0: shift(linspace(1, 0), a),
    float32 [steps + 1]."""
    return shift(torch.linspace(1, 0, steps + 1), a)


def training_grid(sigma_max, sigma_min, cells, device=None):
    """The noise levels that training visits, called cells: linspace(sigma_max, sigma_min, cells), float32 [cells],
    noisiest first, on a device.

    Released code: 1000 cells between entries 5 and 25 of `sigma_steps(50, 3)`, that is 0.9643 and 0.75. The
    paper speaks of the full trajectory.
    """
    return torch.linspace(sigma_max, sigma_min, cells, device=device)


@dataclass
class Injection:
    """Where one branch works, for B images: the network is called at `sigma`, and its one step ends at `sigma_to`
    (both [B]).

    `cell` [B], 0 .. T, counts cells of the training grid from the clean end. The released discount depends on it.
    """
    sigma: torch.Tensor
    sigma_to: torch.Tensor
    cell: torch.Tensor


def reach_of(groundtruth_ratio, cells):
    """How many cells the network steps over, int((1 - ratio) T) + 1 (released code); the known noise gives the rest.

    A ratio of 0.92 leaves the network 80 of 1000 cells, 0.017 of sigma. Fig. 3 gives 0.075 and 0.025 as the weight of
    the model's term. In Eq. 5 that term is dsigma eps_theta. So they are steps sigma - sigma_to, not ratios."""
    return int((1 - groundtruth_ratio) * cells) + 1


def place(branch, m, grid, reach, meet="landing"):
    """Where a branch calls the network and where its step ends: an `Injection`. The two branches meet in cell m
    [B] (long), counted from the clean end of grid [T]; 1 <= m < T.

    meet = "landing" (released code): both steps end in cell m. The denoising branch calls the network `reach` cells
    above it, and the inverting one as far below. meet = "call" (the paper's Eqs. 12, 13, "at timestep t"): both call
    the network in cell m, and their steps end `reach` cells below and above. Near the ends the reach shrinks.
    """
    T = len(grid)
    k = torch.minimum(torch.minimum(T - m, m), torch.full_like(m, reach))
    if meet == "call":
        landing = (T - m + k).clamp(max=T - 1) if branch == "denoise" else T - m - k
        return Injection(grid[T - m], grid[landing], m)
    if branch == "denoise":
        return Injection(grid[T - m - k], grid[T - m], m)
    below = (m - k).clamp(min=1)
    return Injection(grid[T - below], grid[T - (below + k).clamp(max=T)], below)


def draw_middle(n, cells, generator):
    """n cells m ~ U{5, ..., cells - 5} of 1000 cells (released code), U{2, ..., 98} of 100 (the authors'
    second recipe), long [n]."""
    margin = max(2, cells // 200)
    return torch.randint(margin, cells - margin + 1, (n,), generator=generator)


# ------------------------------------------------------------------------------------------------------ Eq. 6
def discount(cell, late, early, cells):
    """The released code's late-timestep discount d = linspace(late, early, T)[cell], [B]: it weighs one text
    feature (1 + d), see `srpo_reward.relative_released`. cell 0 is the clean (late) end.
    """
    return torch.linspace(late, early, cells, device=cell.device)[cell]


def lam(sigma, sigma_max, sigma_min, early, late, a=1.0):
    """Eq. 6's lambda(t): from `early` at sigma_max down to `late` at sigma_min, [B]. t is where the network
    is called. On the way it follows shift(u, a), a straight line for a = 1.

    The paper asks for a decaying factor and gives no numbers; late = early switches the discount off.
    """
    u = (sigma - sigma_min) / (sigma_max - sigma_min)
    return late + (early - late) * shift(u, a)


def lam_landing(sigma_to, sigma_max, sigma_min, cells, early, late, a=1.0):
    """Eq. 6's lambda(t) where t is the cell on which a branch lands, [B]: late + (early - late) shift(m / T, a).

    m counts the T cells from the clean end. The authors' second recipe: a = 3, early 1, late 0, T = 100.
    """
    m = 1 + (cells - 1) * (sigma_to - sigma_min) / (sigma_max - sigma_min)
    return late + (early - late) * shift(m / cells, a)


def aggregate(r, weight, n):
    """Eq. 6:  r(x_t) = lambda(t) sum_i r_i  over the n injections of one x0; this is the term of one
    injection.

    r, weight [B]. Returns weight r / n, [B]. The sum is never built. Each term is differentiated as soon as it is
    known, and the gradients add up (the paper's gradient accumulation). So memory does not grow with n. n counts all
    terms, injections times branches. Differs from the paper by the constant 1 / n, as in the released code (n = 2: one
    denoising, one inverting state).
    """
    return weight * r / n
