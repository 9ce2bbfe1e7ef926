"""The plan as text: `python train.py --plan`."""

import torch

from engine.memory import gpus
from engine.memory.plan import GIB, divide
from engine.memory.work import GIGA, TERA, saved_by_float8

MIB = 2**20


def in_bytes(amount):
    """12884901888 -> "    12.0 GiB"."""
    return f"{amount / GIB:8.1f} GiB" if amount >= GIB / 10 else f"{amount / MIB:8.1f} MiB"


def in_flop(amount):
    """1.2e13 -> "    12.0 TFLOP"."""
    return f"{amount / TERA:8.1f} TFLOP" if amount >= TERA / 10 else f"{amount / GIGA:8.1f} GFLOP"


def in_time(seconds):
    """95 -> "1.6 min"; 7000 -> "1.9 h"."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def show(job, counts, world_size, card, share):
    """Print the plan of one of world_size processes, and the seconds of an update on a card. share: of the card's peak
    that is reached, 0 to 1. Raises UserError."""
    plan = divide(job, counts, world_size, torch.bfloat16)
    memory = {"parameters": plan.parameters, "gradients": plan.gradients, "optimizer": plan.optimizer,
              "activations": plan.activations, "gathered": plan.gathered, "reward path": plan.reward_path,
              "frozen": plan.frozen, "text encoders": plan.peak_in_texts,
              "peak in the update": plan.peak_in_update,
              "peak in the rollout": plan.peak_in_rollout}
    if job.reward_apart:
        memory["the rewards' GPU"] = plan.rewards
    work = {"rollout": plan.rollout, "update": plan.update, "decode": plan.decode, "reward": plan.reward}
    seconds = plan.flop / TERA / (gpus.PEAK[card] * share)

    batch, accumulate = job.share(world_size)
    batches = f" x {accumulate} batches" if accumulate > 1 else ""
    print(f"predicted, not measured: {job.model}, {plan.all_parameters / 1e6:,.1f} M parameters, "
          f"{job.size} x {job.size} pixels, an update of {job.images} images: {batch} at a time{batches} a process, "
          f"{world_size} process{'es' * (world_size > 1)}, "
          f"activation checkpointing {'on' if job.checkpointing else 'off'}")
    print("\nmemory per process")
    for name, amount in memory.items():
        print(f"    {name:20}{in_bytes(amount)}")
    print("\nwork per process and update")
    for name, amount in work.items():
        print(f"    {name:20}{in_flop(amount)} {100 * amount / plan.flop:6.1f} %")
    print(f"    {'received':20}{plan.received / GIGA:8.1f} GB")
    print(f"\n{in_flop(plan.flop).strip()} an update and process: {seconds:.3g} s on {card} at {share:.0%} of its "
          f"{gpus.PEAK[card]} TFLOP/s, without communication; {job.updates} updates: "
          f"{in_time(job.updates * seconds)}")
    if job.rollout_steps and card not in gpus.WITHOUT_FLOAT8:
        saved = saved_by_float8(job, plan, world_size, gpus.PEAK[card], share)
        print(f"--rollout-dtype fp8: {seconds - saved:.3g} s an update, if products in float8 take half the time")
