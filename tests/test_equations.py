"""Claims about Eqs. 3-13, each on random tensors of the shapes FLUX has."""

import pytest
import torch
import torch.nn.functional as F
from builders import fixed

import command
import direct_align as da
import recipe
import srpo_reward as sr

B, N, C = 3, 16, 64


def state(seed=0):
    g = torch.Generator().manual_seed(seed)
    x0, eps = (torch.randn(B, N, C, generator=g, dtype=torch.float64),
               torch.randn(B, N, C, generator=g, dtype=torch.float64))
    sigma = torch.tensor([0.96, 0.85, 0.76], dtype=torch.float64)
    return x0, eps, sigma


def features(seed=0, d=32):
    g = torch.Generator().manual_seed(seed)
    return [F.normalize(torch.randn(B, d, generator=g, dtype=torch.float64), dim=-1) for _ in range(4)]


def test_eq3_is_the_straight_line_between_image_and_noise():
    x0, eps, _ = state()
    assert torch.equal(da.inject(x0, eps, 0.0), x0) and torch.equal(da.inject(x0, eps, 1.0), eps)
    assert torch.allclose(da.inject(x0, eps, 0.25), 0.75 * x0 + 0.25 * eps)


def test_eq4_recovers_x0_exactly_at_any_noise_level():
    x0, eps, sigma = state()
    for s in (sigma, 0.999, 0.5, 0.0):
        assert (da.recover_exact(da.inject(x0, eps, s), eps, s) - x0).abs().max() < 1e-11


@pytest.mark.parametrize("sigma_to", [0.94, 0.97])
def test_eq5_recovers_x0_exactly_for_a_perfect_model(sigma_to):
    """Both forms, in the denoise direction (0.94, below the call) and the invert direction (0.97, above
    it)."""
    x0, eps, _ = state()
    x_t = da.inject(x0, eps, 0.96)
    v = eps - x0
    assert (da.recover(x_t, v, eps, 0.96, sigma_to) - x0).abs().max() < 1e-11
    eps_theta = da.epsilon(x_t, v, 0.96)
    assert torch.allclose(eps_theta, eps)
    assert (da.recover_epsilon(x_t, eps_theta, eps, 0.96, sigma_to) - x0).abs().max() < 1e-11


def test_eq5_mixing_the_two_forms_is_wrong_even_for_a_perfect_model():
    x0, eps, _ = state()
    x_t, v = da.inject(x0, eps, 0.96), eps - x0
    velocity_for_epsilon = da.recover_epsilon(x_t, v, eps, 0.96, 0.94)
    epsilon_for_velocity = da.recover(x_t, da.epsilon(x_t, v, 0.96), eps, 0.96, 0.94)
    alpha_of_the_call = (x_t + (0.94 - 0.96) * v - 0.94 * eps) / (1 - 0.96)
    for wrong in (velocity_for_epsilon, epsilon_for_velocity, alpha_of_the_call):
        assert (wrong - x0).abs().mean() > 0.25


def test_eq12_and_eq13_the_models_sign_flips_between_the_branches():
    """x0_hat = x0 + gain (v_theta - v): gain is negative when denoising, positive when inverting."""
    x0, eps, _ = state()
    x_t, error = da.inject(x0, eps, 0.85), torch.ones(B, N, C, dtype=torch.float64)
    v_theta = (eps - x0) + error
    for sigma_to, gain in ((0.83, -0.02 / 0.17), (0.87, 0.02 / 0.13)):
        assert torch.allclose(da.recover(x_t, v_theta, eps, 0.85, sigma_to) - x0, gain * error)
        as_printed = da.recover_epsilon(x_t, da.epsilon(x_t, v_theta, 0.85), eps, 0.85, sigma_to)
        assert torch.allclose(as_printed - x0, gain * (1 - sigma_to) * error)


def test_a_sigma_for_each_image_equals_one_by_one():
    x0, eps, sigma = state()
    v, sigma_to = torch.randn_like(x0), sigma - 0.02
    for f in (da.recover, da.recover_epsilon):
        whole = f(da.inject(x0, eps, sigma), v, eps, sigma, sigma_to)
        alone = [f(da.inject(x0[i:i + 1], eps[i:i + 1], sigma[i].item()), v[i:i + 1], eps[i:i + 1],
                   sigma[i].item(), sigma_to[i].item()) for i in range(B)]
        assert torch.allclose(whole, torch.cat(alone))


def test_eq6_the_accumulated_gradient_is_the_gradient_of_the_sum():
    torch.manual_seed(0)
    theta = torch.randn(8, requires_grad=True)
    states, weights = [torch.randn(B, 8) for _ in range(4)], [torch.rand(B) for _ in range(4)]

    def terms():
        rewards = [(x * theta).sum(-1).tanh() for x in states]
        return zip(weights, rewards, strict=True)

    (sum(w * r for w, r in terms()) / 4).mean().backward()
    whole = theta.grad.clone()
    theta.grad = None
    for w, r in terms():
        da.aggregate(r, w, 4).mean().backward()
    assert torch.allclose(whole, theta.grad)


def test_eq6_lambda_decays_towards_the_late_steps():
    sigma = torch.tensor([0.95, 0.85, 0.75])
    assert da.lam(sigma, 0.95, 0.75, 1.0, 0.4).tolist() == pytest.approx([1.0, 0.7, 0.4])
    assert da.lam(sigma, 0.95, 0.75, 1.0, 1.0).tolist() == [1.0] * 3


def test_eq7_and_eq8_are_the_cosine_with_the_text():
    f, C0, C1, _ = features()
    assert torch.allclose(sr.preference(f, C1), F.cosine_similarity(f, C1))


def sums(f, *C):
    """r0, r1, r2 of a CLIP-like reward with image features f and text features C, as train.srpo gets them."""
    return fixed(lambda images: images, *C).of(f, sr.texts_of([""] * len(f), "a", "b"))


def test_eq9_is_eq10():
    """r1 - r2 of a CLIP-like reward is one dot product with C1 - C2, to the bit."""
    f, C0, C1, C2 = features()
    r0, r1, r2 = sums(f, C0, C1, C2)
    assert torch.equal(sr.relative(r1, r2).value(), sr.preference(f, C1 - C2))
    assert torch.allclose(sr.relative(r1, r2).value(), sr.preference(f, C1) - sr.preference(f, C2))


def test_eq11_as_printed():
    f, _, C1, C2 = features()
    r1, r2 = sr.preference(f, C1), sr.preference(f, C2)
    assert torch.allclose(sr.relative_cfg(r1, r2, 1.5), 1.5 * r1 - 0.5 * r2)
    assert torch.allclose(sr.relative_cfg(r1, r2, 1.0), r1)


def test_eq12_and_eq13_every_form_wants_the_same_thing_in_both_branches():
    """Ascending the inverting branch's reward must not undo the denoising branch's: since the network's sign
    flips, the text weights of C1 and C2 have to flip too. (The printed form has one text a branch: C1 above,
    C2 below.)"""
    f, C0, C1, C2 = features()
    weights = {}
    for form in recipe.FORMS:
        for branch in ("denoise", "invert"):
            probe = f.clone().requires_grad_()
            sr.branch_reward(form, branch, *sums(probe, C0, C1, C2), 0.25, 1.5).value().sum().backward()
            basis = torch.stack([C0, C1, C2], -1)
            weights[form, branch] = torch.linalg.lstsq(
                basis[0], probe.grad[0, :, None]).solution[:, 0].tolist()
    expected = {"released": ([0, 1.25, -1], [0, -1, 1.25]), "srp": ([0, 1, -1], [0, -1, 1]),
                "cfg": ([0, 1.5, -0.5], [0, -0.5, 1.5]), "branches": ([0, 1, 0], [0, 0, 1]),
                "sgp": ([0, 1, 0], [0, -1, 0]), "plain": ([1, 0, 0], [-1, 0, 0])}
    for form, pair in expected.items():
        for branch, texts in zip(("denoise", "invert"), pair, strict=True):
            assert weights[form, branch] == pytest.approx(texts, abs=1e-9), (form, branch)


@pytest.mark.parametrize("meet", ["landing", "call"])
def test_placement_stays_on_the_grid_and_on_the_right_side(meet):
    grid = da.training_grid(27 / 28, 0.75, 1000)
    m = torch.arange(5, 996)
    down, up = (da.place(b, m, grid, 80, meet) for b in ("denoise", "invert"))
    assert (down.sigma > down.sigma_to).all() and (up.sigma < up.sigma_to).all()
    far = (m > 160) & (m < 840)
    same = (down.sigma_to, up.sigma_to) if meet == "landing" else (down.sigma, up.sigma)
    assert torch.equal(same[0][far], same[1][far])


def test_eq6_lambda_of_the_authors_second_recipe_is_that_of_the_landing_cell():
    """shift(m / T, 3) of m = 30 of 100 cells is 0.5625 where a branch lands on it; called 41 cells away it is 0.82."""
    a = command.flags(["--recipe", "2026"])
    grid = da.training_grid(*a.sigma_range, a.cells)
    at = da.place("denoise", torch.tensor([30]), grid, da.reach_of(a.groundtruth_ratio, a.cells))
    landing = da.lam_landing(at.sigma_to, *a.sigma_range, a.cells, *a.lam, a.lam_shift)
    assert a.lam_at == "landing" and landing.item() == pytest.approx(0.5625, abs=1e-5)
    call = da.lam(at.sigma, *a.sigma_range, *a.lam, a.lam_shift)
    assert call.item() > 0.8


@pytest.mark.parametrize("cells, low, high", [(1000, 5, 995), (100, 2, 98)])
def test_middles_are_uniform_over_the_grid(cells, low, high):
    """Released code: U{5, ..., 995} of 1000 cells; U{2, ..., 98} of 100. Ten classes, 20,000 draws:
    chi-square below its 99.9 % point with 9 degrees of freedom. A logit-normal choice fails by far."""
    def in_classes(values):
        return torch.histc(values.double(), 10, low - 0.5, high + 0.5)

    whole = torch.arange(low, high + 1)
    expected = in_classes(whole) * 20_000 / len(whole)
    m = da.draw_middle(20_000, cells, torch.Generator().manual_seed(0))
    assert (m.min().item(), m.max().item()) == (low, high)
    assert ((in_classes(m) - expected) ** 2 / expected).sum() < 27.9
    normal = torch.randn(20_000, generator=torch.Generator().manual_seed(0)).sigmoid()
    assert ((in_classes(low + normal * (high - low)) - expected) ** 2 / expected).sum() > 1000


@pytest.mark.parametrize("branch", ["denoise", "invert"])
def test_the_network_is_called_uniformly_over_the_released_range(branch):
    """Noise levels of both branches: between 0.964 and 0.75, their quarters at a quarter of the range each, to 0.005;
    mean 0.857."""
    m = da.draw_middle(20_000, 1000, torch.Generator().manual_seed(1))
    sigma = da.place(branch, m, da.training_grid(27 / 28, 0.75, 1000), da.reach_of(0.92, 1000)).sigma
    assert 0.75 <= sigma.min() and sigma.max() <= 27 / 28
    quarters = torch.quantile(sigma, torch.tensor([0.25, 0.5, 0.75]))
    even = 0.75 + (27 / 28 - 0.75) * torch.tensor([0.25, 0.5, 0.75])
    # the denoising branch is called 80 cells above the middle, the inverting one 80 below
    moved = (80 if branch == "denoise" else -80) * (27 / 28 - 0.75) / 999
    assert (quarters - even - moved).abs().max() < 0.005

