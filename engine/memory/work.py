"""The work of an update, FLOP, and how long it takes."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.memory import gpus
from engine.memory.counts import create, flop_of, forward

GIGA, TERA = 1e9, 1e12
GIB = 2**30
BUS = 25                # GB/s between host and card: what copies from pinned memory reach on PCIe 4.0 x16


def flop_per_call(job, once):
    """FLOP of one call with a gradient. once: FLOP of a forward.

    The backward takes `once` for the gradient of the inputs, and `once` for that of the parameters, which frozen
    parameters do not need. Activation checkpointing runs the forward again. The adapters' own work, about a hundredth,
    is left out.
    """
    backward = 1 if job.lora else 2
    of_empty = {"both": 1 + backward + job.checkpointing, "prompt": 1}.get(job.cfg, 0)
    return once * (1 + backward + job.checkpointing + of_empty)


def flop_per_step(job, once):
    """FLOP of one step of a rollout. Classifier-free guidance calls the network for the empty prompt too."""
    return once * (1 if job.cfg is None else 2)


def forward_flop(job):
    """FLOP of one call of the transformer for one image."""
    with FakeTensorMode():
        transformer = create(job.transformer, torch.bfloat16)
        return flop_of(forward, transformer, job.image_tokens, job.text_tokens, torch.bfloat16)


def update_flop(job, processes=1):
    """FLOP of the transformer in one update, for each of so many processes: the rollout and the calls with a
    gradient."""
    once = forward_flop(job)
    batch, accumulate = job.share(processes)
    return batch * accumulate * (job.rollout_steps * flop_per_step(job, once) + job.calls * flop_per_call(job, once))


def seconds(prediction, peak, share):
    """Seconds of an update of one process: the sum of computing and copying, for FSDP2 copies a block on the stream on
    which it computes. peak: of the card, TFLOP/s; share: of it that is reached, 0 to 1."""
    return prediction.flop / TERA / (peak * share) + prediction.bus / GIGA / BUS


def saved_by_float8(job, prediction, processes, peak, share):
    """Seconds of an update of one of so many processes that --rollout-dtype fp8 saves, if a product in float8 takes
    half the time of one in bf16. Attention stays as it is: two products of tokens^2 x width in every block."""
    config = job.transformer
    width = config["num_attention_heads"] * config["attention_head_dim"]
    blocks = config["num_layers"] + config["num_single_layers"]
    attention = 4 * (job.image_tokens + job.text_tokens) ** 2 * width * blocks
    batch, accumulate = job.share(processes)
    others = prediction.rollout - batch * accumulate * job.rollout_steps * attention
    return others / 2 / TERA / (peak * share)


def achieved(flop, seconds, device):
    """{"tflop_per_second"} of a measured update of this process. On a GPU also "share_of_peak", None for a card that
    is not in gpus.PEAK; and "peak_gib", the most memory allocated so far."""
    rate = flop / seconds / TERA
    reached = {"tflop_per_second": round(rate, 4)}
    if device.type == "cuda":
        card = torch.cuda.get_device_name(device)
        peaks = [peak for name, peak in gpus.PEAK.items() if name in card]
        reached["share_of_peak"] = round(rate / peaks[0], 4) if peaks else None
        reached["peak_gib"] = round(torch.cuda.max_memory_allocated(device) / GIB, 2)
    return reached
