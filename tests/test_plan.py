"""Claims about plan.py: the real FLUX.1-dev config, with no GPU and no weights."""

import pytest
import torch

from engine import old_flags as room
from engine import plan

GIB, TERA = 2**30, 1e12


@pytest.fixture(scope="module")
def predicted():
    cases = {(n, checkpointing): plan.predict(
                 room.parser("").parse_args([] if checkpointing else ["--no-checkpointing"]),
                 n, torch.bfloat16)
             for n, checkpointing in ((1, True), (8, True), (32, True), (8, False))}
    return cases


def test_the_counts_of_flux_1_dev(predicted):
    """11.90 B parameters; 25 rollout steps of 37.28 TFLOP; two calls of four times that; decode and ViT-H."""
    one = predicted[8, True]
    assert one["all_parameters"] / 1e9 == pytest.approx(11.901, abs=1e-3)
    assert one["rollout"] / TERA == pytest.approx(25 * 37.28, rel=1e-3)
    assert one["update"] / TERA == pytest.approx(2 * 4 * 37.28, rel=1e-3)
    assert one["decode"] / TERA == pytest.approx(20.2, rel=0.02)
    assert predicted[8, False]["update"] / TERA == pytest.approx(2 * 3 * 37.28, rel=1e-3)


@pytest.mark.parametrize("n, transformer", [(1, 180.6), (8, 26.6), (32, 10.3)])
def test_the_transformers_peak_agrees_with_a_memory_tracker(predicted, n, transformer):
    """Another prediction, torch's FSDPMemTracker under fake tensors, within 5 %."""
    p = predicted[n, True]
    ours = sum(p[k] for k in ("parameters", "gradients", "optimizer", "activations", "gathered")) / GIB
    assert ours == pytest.approx(transformer, rel=0.05)


def test_recomputing_activations_saves_what_it_says(predicted):
    saved = (predicted[8, False]["activations"] - predicted[8, True]["activations"]) / GIB
    assert 15 < saved < 25


def test_state_is_16_bytes_a_parameter_over_the_shards(predicted):
    for (n, _), p in predicted.items():
        assert (p["parameters"] + p["gradients"] + p["optimizer"]
                == pytest.approx(16 * p["all_parameters"] / n))
    replicated = plan.predict(room.parser("").parse_args(["--replicas", "4", "--size", "64"]),
                              32, torch.bfloat16)
    assert replicated["parameters"] == pytest.approx(predicted[8, True]["parameters"])


def test_a_size_that_the_model_cannot_have():
    with pytest.raises(ValueError, match="--size 100: must be a multiple of 16"):
        plan.predict(room.parser("").parse_args(["--size", "100"]), 8, torch.bfloat16)


def test_what_does_not_fit_says_which_flag_helps(predicted):
    a = room.parser("").parse_args(["--no-checkpointing"])
    plan.advice(40 * GIB, 80 * GIB, a, 8)
    with pytest.raises(ValueError, match="predicted peak 186 GiB a GPU, this one has 80; "
                                         "what helps: --checkpointing, or 4 GPUs"):
        plan.advice(186 * GIB, 80 * GIB, a, 1)


def test_the_miniatures_plan_is_what_a_run_computes(miniature):
    """FLOP of one forward, predicted on meta from the config, against the same call counted while it really
    runs."""
    from torch.utils.flop_counter import FlopCounterMode
    predicted = plan.transformer_flop(miniature.transformer.config, 16, 16)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        plan.forward(miniature.transformer, 16, 16, torch.float32)
    # blocks x (two products of 2) x 32 x 32 tokens x heads x width: left out on a CPU
    attention = 6 * 4 * 32 * 32 * 4 * 32
    assert counter.get_total_flops() == pytest.approx(predicted - attention, rel=1e-6)


def test_the_miniatures_activations_are_what_a_run_saves(miniature):
    """Bytes saved for the backward, predicted on fake tensors, against the same call on real ones:
    within 1 %."""
    a = room.parser("").parse_args(["--model", "miniature", "--reward", "miniature/reward", "--size", "64",
                                    "--no-checkpointing"])
    parameters = list(miniature.transformer.parameters())
    measured, _ = plan.count_saved(lambda: plan.forward(miniature.transformer, 16, 16, torch.float32),
                                   parameters)
    assert plan.predict(a, 1, torch.float32)["activations"] == pytest.approx(measured, rel=0.01)


def test_calls_of_the_transformer_are_counted(monkeypatch, tmp_path, miniature):
    """Per update: the rollout's steps, and one a branch and injection; nothing twice. (Samples are counted
    apart.)"""
    import flux
    import train
    calls, velocity = [], flux.velocity
    monkeypatch.setattr(flux, "velocity",
                        lambda *args: calls.append(torch.is_grad_enabled()) or velocity(*args))
    monkeypatch.setattr("sys.argv", ["train.py", "--model", "miniature", "--batch", "2",
                                     "--rollout-steps", "5", "--eval-steps", "3", "--watch", "1",
                                     "--eval", "0", "--steps", "2", "--injections", "2",
                                     "--out", str(tmp_path / "run")])
    train.main()
    assert sum(calls) == 2 * (2 * 2) and len(calls) - sum(calls) == 2 * 5 + 3 * 3
