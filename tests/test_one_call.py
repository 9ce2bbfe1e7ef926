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


def made_by(miniature, a, batch, one_call):
    """(the gradient, every term's reward, how often the network was called) of an update's losses."""
    miniature.branches_are_one_call = one_call
    shapes = []
    count = miniature.transformer.register_forward_pre_hook(
        lambda module, arguments, named: shapes.append(len(named["hidden_states"])), with_kwargs=True)
    miniature.transformer.zero_grad()
    terms = backward(a, miniature, batch[0], batch[1], times=3)
    count.remove()
    miniature.branches_are_one_call = False
    gradient = torch.cat([p.grad.flatten() for p in miniature.transformer.parameters() if p.grad is not None])
    return gradient, torch.stack([term.reward.detach() for term in terms]), shapes


@pytest.mark.parametrize("memory, processes, checkpointing, one_call", [
    ("offload", 1, True, True), ("stream", 1, False, True), ("fp8-offload", 1, True, True),
    ("masters", 1, True, False), ("split", 1, True, False), ("bf16", 8, True, False), ("fp8", 1, True, False),
    ("masters", 8, True, True), ("split", 2, True, True), ("fp8", 8, True, True), ("masters", 8, False, False)])
def test_branches_are_one_call_where_parameters_come_from_elsewhere(memory, processes, checkpointing, one_call):
    assert modes.branches_are_one_call(memory, processes, checkpointing) == one_call


def test_one_call_for_both_branches_makes_the_same_gradient(miniature, flags, batch):
    """To 1e-6, with half as many calls of twice the images; each term's backward comes before the network's."""
    a = flags("--injections", "2")
    each, rewards_each, shapes = made_by(miniature, a, batch, False)
    assert shapes == [3, 3, 3, 3]
    joint, rewards_joint, shapes = made_by(miniature, a, batch, True)
    assert shapes == [6, 6]
    assert ((joint - each).norm() / each.norm()).item() < 1e-6
    assert torch.allclose(rewards_joint, rewards_each, atol=1e-6)


def test_a_single_state_is_called_as_it_was(miniature, flags, batch):
    """Bit for bit."""
    a = flags("--branches", "denoise")
    before, *_ = made_by(miniature, a, batch, False)
    after, _, shapes = made_by(miniature, a, batch, True)
    assert torch.equal(before, after) and set(shapes) == {3}


def test_what_was_called_and_not_differentiated_leaves_no_gradient(miniature, monkeypatch):
    miniature.transformer.zero_grad()
    c = flow.Condition(torch.zeros(1, 16, 64), torch.zeros(1, 64), (4, 4))
    state = torch.zeros(1, 16, 64), torch.ones(1)
    monkeypatch.setattr(miniature, "branches_are_one_call", True)
    calls = Calls(miniature, [state, state])
    calls.velocity(None, None, c, 3.5)
    calls.backward()
    assert all(p.grad is None for p in miniature.transformer.parameters())
