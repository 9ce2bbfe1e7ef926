"""Run by test_parallel.py under torchrun: `worker.py OUT REPLICAS RANKS IMAGES BATCH [bf16]`. One update's
gradient of this process's share of the images, --batch of them at a time, written in full by rank 0; and the
number of all-gathers of a rollout of five steps."""

import sys
from pathlib import Path

import torch
from builders import a_batch, backward
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

import command
import direct_align as da
import flow
import rewards
from engine.memory import parallel
from engine.model import tensors
from engine.model.folder import Model


class CountGathers(TorchDispatchMode):
    """Counts the all-gathers that run inside."""
    n = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.n += "allgather" in str(op)
        return op(*args, **(kwargs or {}))


def as_on_a_gpu(local_rank=0):
    """float32 masters, bf16 compute and VAE."""
    return torch.device("cpu"), torch.bfloat16


out = sys.argv[1]
replicas, ranks, images, size = map(int, sys.argv[2:6])
a = command.parser().parse_args(["--threshold", "off"])
if sys.argv[6:] == ["bf16"]:
    parallel.device_and_dtype = as_on_a_gpu
world = parallel.World(replicas)
net = flow.load(Model("miniature"), None, world.device, world.dtype, world)
if sys.argv[6:] == ["bf16"]:
    net.transformer.enable_gradient_checkpointing()  # recomputed activations
    assert net.vae.dtype == torch.bfloat16 and next(net.transformer.parameters()).dtype == torch.float32
prompts = Path("miniature/prompts.txt").read_text().splitlines()[:images]
reward = rewards.load_rewards("miniature/reward")
levels = torch.tensor([100, 400, 600, 900]).repeat(images // 4)
batches = [slice(i, i + size) for i in range(0, images, size)]
# One process takes all, one after the other.
mine = batches if world.size == 1 else batches[world.rank::ranks]
for rows in mine:
    c = flow.encode_prompts(Model("miniature"), prompts[rows]).condition(slice(None), (4, 4), "cpu")
    eps = flow.noise(net, (4, 4), range(images))[rows]
    with CountGathers() as count:
        x0 = net.rollout(eps, c, da.sigma_steps(5, 3.0), 3.5)
    backward(a, net, reward, a_batch(prompts[rows], c, x0, eps, [levels[rows]]), times=len(mine))
gradient = {name: tensors.full(p.grad) for name, p in net.transformer.named_parameters()}
if world.main:
    save_file({**gradient, "gathers": torch.tensor([count.n])}, out)
world.close()
