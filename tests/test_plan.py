"""Claims about engine/plan.py: the real FLUX.1-dev config, with no GPU and no weights."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import flux
import train
from engine import plan
from engine.errors import UserError

GIB, TERA = 2**30, 1e12


def job(*argv):
    """What train.py plans with these flags."""
    return train.job(train.flags([*argv]))


def miniature_job(*argv):
    return job("--model", "miniature", "--reward", "miniature/reward", "--size", "64", *argv)


@pytest.fixture(scope="module")
def predicted():
    """{(processes, activation checkpointing): the prediction for FLUX.1-dev in bf16}."""
    predictions = {}
    for flag, processes in (("--checkpointing", [1, 8, 32]), ("--no-checkpointing", [1, 8])):
        its_job = job(flag)
        counts = plan.count(its_job, torch.bfloat16)
        for n in processes:
            predictions[n, its_job.checkpointing] = plan.divide(its_job, counts, n, torch.bfloat16)
    return predictions


def test_the_counts_of_flux_1_dev(predicted):
    """11.90 B parameters; 25 rollout steps of 37.28 TFLOP; two calls of four times that; decode and ViT-H."""
    one = predicted[8, True]
    assert one.all_parameters / 1e9 == pytest.approx(11.901, abs=1e-3)
    assert one.rollout / TERA == pytest.approx(25 * 37.28, rel=1e-3)
    assert one.update / TERA == pytest.approx(2 * 4 * 37.28, rel=1e-3)
    assert one.decode / TERA == pytest.approx(20.2, rel=0.02)
    assert predicted[8, False].update / TERA == pytest.approx(2 * 3 * 37.28, rel=1e-3)
    assert plan.update_flop(job()) == one.rollout + one.update


@pytest.mark.parametrize("n, transformer", [(1, 180.6), (8, 26.6), (32, 10.3)])
def test_the_transformers_peak_agrees_with_a_memory_tracker(predicted, n, transformer):
    """Another prediction, torch's FSDPMemTracker under fake tensors, within 5 %."""
    p = predicted[n, True]
    ours = p.parameters + p.gradients + p.optimizer + p.activations + p.gathered
    assert ours / GIB == pytest.approx(transformer, rel=0.05)


def test_recomputing_activations_saves_what_it_says(predicted):
    saved = (predicted[8, False].activations - predicted[8, True].activations) / GIB
    assert 15 < saved < 25


def test_state_is_16_bytes_a_parameter_over_the_shards(predicted):
    for (n, _), p in predicted.items():
        assert p.parameters + p.gradients + p.optimizer == pytest.approx(16 * p.all_parameters / n)
    replicated = plan.predict(job("--replicas", "4", "--size", "64"), 32, torch.bfloat16)
    assert replicated.parameters == pytest.approx(predicted[8, True].parameters)


def test_groups_of_processes_average_their_gradients():
    """HSDP: beside what a group's processes gather and average among themselves, twice 3/4 of a shard's
    float32 gradient a call, between four groups."""
    one = miniature_job()
    alone = plan.predict(one, 8, torch.bfloat16)
    grouped = plan.predict(replace(one, replicas=4), 32, torch.bfloat16)
    between = one.calls * 2 * 3 / 4 * grouped.gradients
    assert grouped.received == pytest.approx(alone.received + between)
    with pytest.raises(UserError, match="--replicas 4: does not divide the 6 processes"):
        plan.predict(replace(one, replicas=4), 6, torch.bfloat16)


def test_accumulated_batches_take_time_and_no_more_activations():
    """All work and communication four times; but the later rollouts have the gradients beside them."""
    one = miniature_job()
    four = miniature_job("--accumulate", "4")
    once, times = plan.predict(one, 8, torch.bfloat16), plan.predict(four, 8, torch.bfloat16)
    assert (times.flop, times.received) == (4 * once.flop, 4 * once.received)
    assert plan.update_flop(four) == 4 * plan.update_flop(one)
    assert times.peak_in_update == once.peak_in_update
    assert times.peak_in_rollout == once.peak_in_rollout + once.gradients


def test_a_size_that_the_model_cannot_have():
    with pytest.raises(UserError, match="--size 100.*must be multiples of 16 pixels"):
        job("--size", "100")


def test_what_does_not_fit_says_which_flag_helps(predicted):
    its_job = job("--no-checkpointing")
    assert predicted[8, False].peak < 80 * GIB < predicted[1, False].peak
    plan.check_fits(its_job, 8, 80 * GIB)
    with pytest.raises(UserError, match="predicted peak 212 GiB a GPU, this one has 80; "
                                        "what helps: --checkpointing, or 4 GPUs"):
        plan.check_fits(its_job, 1, 80 * GIB)


def test_no_number_of_gpus_is_advised_that_would_not_do():
    with pytest.raises(UserError, match="what helps: a smaller --batch$"):
        plan.check_fits(replace(miniature_job(), batch=10**6), 1, 80 * GIB)


def test_a_card_that_is_not_known_is_one_line():
    with pytest.raises(UserError, match="--card B7: its peak is not known here; known are H200") as error:
        plan.show(miniature_job(), 8, "B7", 0.4)
    assert "\n" not in str(error.value)


def test_the_default_dtype_stays_as_it_was():
    plan.forward_flop(miniature_job())
    assert torch.get_default_dtype() == torch.float32


def call_of(miniature):
    """The miniature's velocity and what it is called with for one image: 16 image tokens, 16 of text."""
    config = miniature.transformer.config
    c = flux.Condition(torch.zeros(1, 16, config.joint_attention_dim),
                       torch.zeros(1, config.pooled_projection_dim), (4, 4))
    return miniature.velocity, torch.zeros(1, 16, config.in_channels), 0.5, c, 3.5


def test_the_miniatures_plan_is_what_a_run_computes(miniature):
    """FLOP of one forward, predicted from the config, against a call counted while it really runs, to the
    last. torch's own counter leaves out the attention of a CPU: blocks x (two products of 2) x 32 x 32 tokens
    x heads x width."""
    velocity, *arguments = call_of(miniature)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        velocity(*arguments)
    attention = 6 * 4 * 32 * 32 * 4 * 32
    predicted = plan.forward_flop(miniature_job())
    assert predicted == plan.flop_of(velocity, *arguments) == counter.get_total_flops() + attention


def test_the_miniatures_activations_are_what_a_run_saves(miniature):
    """Bytes saved for the backward, predicted on fake tensors, against a call on real ones: within 1 %."""
    measured = plan.saved_by(miniature.transformer.parameters(), *call_of(miniature))
    one = plan.count(miniature_job("--no-checkpointing"), torch.float32)
    assert one.activations == pytest.approx(measured, rel=0.01)


def test_calls_of_the_transformer_are_counted(monkeypatch, tmp_path):
    """Per update: the rollout's steps, and one a branch and injection; nothing twice. (Samples are counted
    apart.)"""
    calls = []
    velocity = flux.Flux.velocity

    def counted(*arguments):
        calls.append("trained" if torch.is_grad_enabled() else "sampled")
        return velocity(*arguments)

    monkeypatch.setattr(flux.Flux, "velocity", counted)
    argv = ["--model", "miniature", "--batch", "2", "--rollout-steps", "5", "--eval-steps", "3",
            "--watch", "1", "--eval", "0", "--steps", "2", "--injections", "2", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["train.py", *argv])
    train.main()
    assert job(*argv).calls == 2 * 2
    assert calls.count("trained") == 2 * (2 * 2)
    assert calls.count("sampled") == 2 * 5 + 3 * 3
