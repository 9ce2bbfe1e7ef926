"""Claims about engine/memory/one_call.py: the calls of all branches as one make the update that one call each does."""

import pytest
import torch
from builders import a_batch, backward

import direct_align as da
import flow
import rewards
from engine.memory import modes
from engine.memory.one_call import Calls
from engine.model.folder import Model

PROMPTS = ["a red circle", "a blue square", "a green ring"]


@pytest.fixture(scope="module")
def batch(miniature):
    """Three images with two injections each."""
    embeddings = flow.encode_prompts(Model("miniature"), PROMPTS)
    reward = rewards.load_rewards("miniature/reward")
    generator = torch.Generator().manual_seed(0)
    eps = torch.randn(3, 16, 64, generator=generator)
    c = embeddings.condition([0, 1, 2], (4, 4), "cpu")
    x0 = miniature.rollout(eps, c, da.sigma_steps(4, 3.0), 1.0)
    return reward, a_batch(PROMPTS, c, x0, eps, [[200, 500, 300], [700, 400, 600]])


def made_by(miniature, a, batch, memory):
    """(the gradient, every term's reward, how often the network was called) of an update's losses."""
    a.memory = memory
    shapes = []
    count = miniature.transformer.register_forward_pre_hook(
        lambda module, arguments, named: shapes.append(len(named["hidden_states"])), with_kwargs=True)
    miniature.transformer.zero_grad()
    terms = backward(a, miniature, batch[0], batch[1], times=3)
    count.remove()
    gradient = torch.cat([p.grad.flatten() for p in miniature.transformer.parameters() if p.grad is not None])
    return gradient, torch.stack([term.reward.detach() for term in terms]), shapes


@pytest.mark.parametrize("memory", modes.ON_THE_HOST)
def test_one_call_for_both_branches_makes_the_same_gradient(miniature, flags, batch, memory):
    """To 1e-6, with half as many calls of twice the images; each term's backward comes before the network's."""
    a = flags("--injections", "2")
    each, rewards_each, shapes = made_by(miniature, a, batch, "masters")
    assert shapes == [3, 3, 3, 3]
    joint, rewards_joint, shapes = made_by(miniature, a, batch, memory)
    assert shapes == [6, 6]
    assert ((joint - each).norm() / each.norm()).item() < 1e-6
    assert torch.allclose(rewards_joint, rewards_each, atol=1e-6)


@pytest.mark.parametrize("branches, memory", [("denoise", "offload"), ("denoise,invert", "auto"),
                                              ("denoise,invert", "split")])
def test_a_single_state_or_a_network_on_the_gpu_is_called_as_it_was(miniature, flags, batch, branches, memory):
    """Bit for bit."""
    a = flags("--branches", branches)
    before, *_ = made_by(miniature, a, batch, "masters")
    after, _, shapes = made_by(miniature, a, batch, memory)
    assert torch.equal(before, after) and set(shapes) == {3}


def test_what_was_called_and_not_differentiated_leaves_no_gradient(miniature):
    miniature.transformer.zero_grad()
    c = flow.Condition(torch.zeros(1, 16, 64), torch.zeros(1, 64), (4, 4))
    state = torch.zeros(1, 16, 64), torch.ones(1)
    calls = Calls(miniature, [state, state], "offload")
    calls.velocity(None, None, c, 3.5)
    calls.backward()
    assert all(p.grad is None for p in miniature.transformer.parameters())
