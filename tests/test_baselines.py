"""Claims about baselines.py: each method's gradient against a slow, literal rendering of its formula."""

from types import SimpleNamespace

import pytest
import torch
from builders import fixed
from torch import nn

import baselines
import direct_align as da
import flow
import srpo_reward as sr
from engine.data.draws import Chance

B, N, C, D = 6, 4, 8, 5
LEVELS = 7


class Small:
    """A network with two weights, in place of FLUX: v = x w + sigma u + text."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.w = nn.Parameter(0.3 * torch.randn(C, C, generator=generator))
        self.u = nn.Parameter(torch.randn(C, generator=generator))
        self.calls = []

    def velocity(self, x, s, c, guidance):
        self.calls.append((s, torch.is_grad_enabled()))
        return torch.tanh(x @ self.w) + da.column(s, x) * self.u + c.txt.mean(1, keepdim=True)

    def shift(self, n, steps):
        return 1.0

    @torch.no_grad()
    def rollout(self, start, c, sigmas, guidance, step=flow.euler, dtype="same"):
        x = start
        for s, s_next in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
            x = step(x, self.velocity(x, s, c, guidance), s, s_next)
        return x

    def decode(self, x, grid):
        return x.sigmoid().view(len(x), 1, N, C)

    def gradient(self, loss):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [self.w, self.u])])


def features(images):
    """f is the mean over the tokens, cubed so that it is not linear."""
    return images[:, 0].mean(1)[:, :D] ** 3


class Liking(sr.Rewards):
    """The reward f.C with the C0, C1, C2 of a batch of this file."""

    def __init__(self, batch):
        super().__init__(fixed(features, batch.C0, batch.C1, batch.C2).parts)


def a_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    c = flow.Condition(normal(B, 3, C), normal(B, 2), (2, 2))
    prompts = [f"prompt {i}" for i in range(B)]
    return SimpleNamespace(prompts=prompts, c=c, start=normal(B, N, C), C0=normal(B, D), C1=normal(B, D),
                           C2=normal(B, D), texts=sr.texts_of(prompts, "a", "b"),
                           chance=Chance(seed, 1, B, slice(0, B)))


def first_of(batch, n):
    """The first n images of a batch."""
    return SimpleNamespace(prompts=batch.prompts[:n], c=batch.c.rows(slice(0, n)), start=batch.start[:n],
                           C0=batch.C0[:n], C1=batch.C1[:n], C2=batch.C2[:n],
                           texts=sr.texts_of(batch.prompts[:n], "a", "b"), chance=Chance(0, 1, n, slice(0, n)))


def flags(**changes):
    options = dict(rollout_steps=LEVELS, shift=3.0, rollout_guidance=1.0, guidance=3.5, threshold=None,
                   refl_steps=4, group=3, form="plain", cfg_k=1.5, discount_denoise=[0.1, 0.25],
                   rollout_dtype="same")
    return SimpleNamespace(**options | changes)


def total(terms):
    return sum(loss for loss, _ in terms if loss is not baselines.STEP)


def rewards_of(net, batch, x0_hat):
    f = features(net.decode(x0_hat, (2, 2)))
    return (f * batch.C0).sum(-1)


def rolled(net, batch, levels):
    """Euler, step by step."""
    x = batch.start
    with torch.no_grad():
        for s, s_next in zip(levels[:-1], levels[1:], strict=True):
            x = x + (s_next - s) * net.velocity(x, s, batch.c, 1.0)
    return x


def levels_of():
    return da.sigma_steps(LEVELS, 3.0).tolist()


def test_refl_is_eq2():
    """The gradient of the mean reward of (x - sigma eps_theta) / alpha, the printed form; one call with a
    gradient, at one of the last four levels; and every one of them is met."""
    met = set()
    for seed in range(20):
        net, batch = Small(), a_batch(seed)
        ours = net.gradient(total(baselines.refl(flags(), net, Liking(batch), batch)))
        s, = [s for s, with_gradient in net.calls if with_gradient]
        k = LEVELS - len(net.calls) + 1
        met.add(k)
        levels = levels_of()
        assert s == pytest.approx(levels[-1 - k])
        x = rolled(net, batch, levels[:len(levels) - k])
        v = net.velocity(x, s, batch.c, 3.5)
        x0_hat = (x - s * (x + (1 - s) * v)) / (1 - s)
        literal = net.gradient(-rewards_of(net, batch, x0_hat).mean())
        assert torch.allclose(ours, literal, atol=1e-6)
    assert met == {1, 2, 3, 4}


def test_draft_lv_is_the_mean_over_the_last_step_and_two_fresh_noises():
    net, batch = Small(), a_batch()
    ours = net.gradient(total(baselines.draft_lv(flags(), net, Liking(batch), batch)))
    s = levels_of()[-2]
    x = rolled(net, batch, levels_of()[:-1])
    chance = Chance(0, 1, B, slice(0, B))
    x0_hat = x - s * net.velocity(x, s, batch.c, 3.5)
    rewards = [rewards_of(net, batch, x0_hat)]
    for _ in range(2):
        x_i = (1 - s) * x0_hat.detach() + s * chance.normal(N, C)
        rewards.append(rewards_of(net, batch, x_i - s * net.velocity(x_i, s, batch.c, 3.5)))
    assert torch.allclose(ours, net.gradient(-torch.stack(rewards).mean()), atol=1e-6)


def test_draft_1_is_refl_with_one_step_left(monkeypatch):
    """Exactly: DRaFT-1 is DRaFT-LV without the fresh noises."""
    monkeypatch.setattr(baselines, "DRAFT_EXTRA", 0)
    net, batch = Small(), a_batch()
    refl = total(baselines.refl(flags(refl_steps=1), net, Liking(batch), batch))
    draft = total(baselines.draft_lv(flags(), net, Liking(batch), batch))
    assert torch.equal(net.gradient(refl), net.gradient(draft))


def test_a_threshold_stops_the_gradient_of_what_is_above_it():
    net, batch = Small(), a_batch()
    for method in (baselines.refl, baselines.draft_lv):
        assert net.gradient(total(method(flags(threshold=-99.0), net, Liking(batch), batch))).abs().max() == 0


def test_the_first_pass_is_on_policy():
    """rho = 1 for every term before the first optimizer step: the loss is minus the mean advantage; nine of
    fifteen transitions of each image are trained, in three parts."""
    net, batch = Small(), a_batch()
    a = flags(rollout_steps=16)
    terms = list(baselines.dancegrpo(a, net, Liking(batch), batch))
    assert [loss is baselines.STEP for loss, _ in terms] == 2 * (9 * [False] + [True]) + 9 * [False]
    A = baselines.advantages(terms[0][1].reward.new_tensor(
        torch.cat([terms[i][1].reward for i in (0, 10, 20)]).tolist()), 3)
    for part, first in enumerate((0, 10, 20)):
        for loss, _ in terms[first:first + 9]:
            assert loss.item() == pytest.approx(-A[2 * part:2 * part + 2].mean().item() / 9, abs=1e-6)


@pytest.mark.parametrize("images, steps", [(6, 3), (4, 3), (3, 3), (2, 2)])
def test_a_rollout_is_trained_in_three_optimizer_steps(images, steps):
    """As released; of two images there are two. Every image draws transitions of its own, none of them twice."""
    net = Small()
    batch = first_of(a_batch(), images)
    seen = []
    chosen = baselines.chosen

    def noted(path, numbers, rows):
        seen.extend(zip(rows, numbers, strict=True))
        return chosen(path, numbers, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "chosen", noted)
        terms = list(baselines.dancegrpo(flags(rollout_steps=16, group=images), net, Liking(batch), batch))
    assert sum(loss is baselines.STEP for loss, _ in terms) + 1 == steps
    of_image = [sorted(number for row, number in seen if row == image) for image in range(images)]
    assert all(len(set(numbers)) == len(numbers) == 9 for numbers in of_image)
    assert of_image[0] != of_image[1] and max(map(max, of_image)) <= 14


def test_the_gradient_of_log_p_by_hand():
    """grad logp = -(sqrt(d) / g) (1 + g^2 (1 - s) / 2s) (1 / D) xi . grad v, at the policy that drew xi."""
    net, batch = Small(), a_batch()
    g, s, s_next = baselines.ETA, 0.7, 0.6
    x = batch.start
    xi = torch.randn(B, N, C, generator=torch.Generator().manual_seed(9))
    v = net.velocity(x, s, batch.c, 1.0)
    x_next = (baselines.sde_mean(x, v, s, s_next) + g * (s - s_next) ** 0.5 * xi).detach()
    logp = baselines.log_probability(x_next, baselines.sde_mean(x, v, s, s_next), s, s_next)
    got = net.gradient(logp.sum())
    v = net.velocity(x, s, batch.c, 1.0)
    factor = -((s - s_next) ** 0.5) / g * (1 + g**2 * (1 - s) / (2 * s)) / (N * C)
    assert torch.allclose(got, net.gradient((factor * xi * v).sum()), atol=1e-5)


def test_a_group_shares_its_first_noise_and_its_advantages_have_mean_0_and_spread_1():
    net, batch = Small(), a_batch()
    seen = []
    velocity = net.velocity
    net.velocity = lambda x, *others: seen.append(x) or velocity(x, *others)
    baselines.stochastic_rollout(flags(), net, batch)
    first = seen[0]
    assert torch.equal(first[0], first[2]) and torch.equal(first[3], first[5])
    assert not torch.equal(first[0], first[3]) and not torch.equal(seen[1][0], seen[1][1])
    A = baselines.advantages(torch.tensor([1.0, 2.0, 3.0, 5.0, 5.0, 8.0]), 3).view(2, 3)
    assert torch.allclose(A.mean(1), torch.zeros(2), atol=1e-6)
    assert torch.allclose(A.std(1), torch.ones(2), atol=1e-6)


def test_the_ratio_is_clipped_as_in_ppo():
    """Beyond the band it has no gradient where that would go further, and has one where it would go back."""
    ratio = torch.tensor([1.1, 1.1, 0.9, 0.9], requires_grad=True)
    A = torch.tensor([1.0, -1.0, 1.0, -1.0])
    baselines.clipped_loss(ratio, A).sum().backward()
    assert ratio.grad.tolist() == [0.0, 1.0, -1.0, 0.0]


@pytest.mark.parametrize("s, s_next", [(0.9, 0.89), (0.5, 0.49), (0.3, 0.29)])
def test_the_sde_keeps_mean_and_variance_to_first_order(s, s_next):
    """For Gaussian data x0 ~ N(m, t^2) the exact velocity is known. A step that starts in the marginal
    N((1 - s) m, (1 - s)^2 t^2 + s^2) ends in the next, but for terms of d^2."""
    m, t, g, d = 0.4, 0.7, baselines.ETA, s - s_next
    x = torch.tensor([[[0.0]], [[1.0]]], dtype=torch.float64)  # the step is affine in x: two points tell it
    variance = (1 - s) ** 2 * t**2 + s**2
    x0_mean = m + (1 - s) * t**2 / variance * (x - (1 - s) * m)
    v = (x - x0_mean) / s
    to_0, to_1 = baselines.sde_mean(x, v, s, s_next).flatten().tolist()
    slope = to_1 - to_0
    mean = to_0 + slope * (1 - s) * m
    assert mean == pytest.approx((1 - s_next) * m, abs=20 * d**2)
    marginal = (1 - s_next) ** 2 * t**2 + s_next**2
    assert slope**2 * variance + g**2 * d == pytest.approx(marginal, abs=20 * d**2)
