"""Run by test_parallel.py under torchrun: `worker.py OUT REPLICAS RANKS [bf16]`. One update's gradient of
this process's share of four images, written in full by rank 0, and the number of all-gathers of a rollout of
five steps."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import direct_align as da
from engine import old_flags as flags
import flux
from engine import parallel
import srpo_reward as sr
import train



class CountGathers(TorchDispatchMode):
    """Counts the all-gathers that run inside."""
    n = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.n += "allgather" in str(op)
        return op(*args, **(kwargs or {}))


out, replicas, ranks = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
a = flags.parser("").parse_args(["--threshold", "off"])
as_on_a_gpu = sys.argv[4:] == ["bf16"]
if as_on_a_gpu:  # float32 masters, bf16 compute and VAE, recomputed activations
    parallel.device_and_dtype = lambda local_rank=0: (torch.device("cpu"), torch.bfloat16)
world = parallel.World(replicas)
model = flux.load("miniature", None, world.device, world.dtype, world)
if as_on_a_gpu:
    model.transformer.enable_gradient_checkpointing()
    assert model.vae.dtype == torch.bfloat16 and next(model.transformer.parameters()).dtype == torch.float32
prompts = Path("miniature/prompts.txt").read_text().splitlines()[:4]
reward = sr.load_reward("miniature/reward")
shares = [slice(r * 4 // ranks, (r + 1) * 4 // ranks) for r in range(ranks)]
# one process takes all shares, one after the other
for mine in shares if world.size == 1 else [shares[world.rank]]:
    txt, pooled, _ = flux.encode_prompts("miniature", prompts[mine])
    txt, pooled = txt.to(world.dtype), pooled.to(world.dtype)
    v = lambda x, s: flux.velocity(model.transformer, x.to(world.dtype), s, txt, pooled, 3.5, (4, 4)).float()
    eps = flux.noise(model, (4, 4), range(4))[mine]
    with torch.no_grad(), parallel.gathered(model.transformer), CountGathers() as count:
        x0 = flux.rollout(v, eps, da.sigma_steps(5, 3.0))
    C = reward.conditions(prompts[mine], "realistic photo", "CG render")
    train.update(a, v, lambda z: flux.decode(model.vae, z, (4, 4)), reward.image_features, x0, eps, *C,
                 [torch.tensor([100, 400, 600, 900])[mine]])
taken = len(shares) if world.size == 1 else 1  # FSDP takes the mean over ranks, autograd the sum over shares
gradient = {n: parallel.whole(p.grad) / taken for n, p in model.transformer.named_parameters()}
if world.main:
    save_file({**gradient, "gathers": torch.tensor([count.n])}, out)
world.close()
