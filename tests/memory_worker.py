"""Run by test_memory.py, alone or under torchrun: `memory_worker.py FOLDER [bf16]`. Two updates of the
miniature with every --memory, each process on its share of four images; rank 0 writes what came of it:
FOLDER/NAME.safetensors, the first gradient and the weights after the updates, and facts.json."""

import json
import sys
from pathlib import Path

import diffusers
import torch
from safetensors.torch import save_file
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule

import flow
import flux
from engine.memory import adamw, layouts, modes, parallel
from engine.model import tensors, trained
from engine.model.folder import Model
from engine.run import checkpoint
from engine.run.finite import weights_are_finite

LR, RANK, SEED = 2.5e-5, 4, 3
KINDS = [(None, name) for name in modes.FULL] + [(RANK, name) for name in modes.LORA]


def as_on_a_gpu(local_rank=0):
    """bf16 compute on a CPU."""
    return torch.device("cpu"), torch.bfloat16


class Small:
    """The miniature with one --memory, and its optimizer."""

    def __init__(self, world, lora, name):
        self.world = world
        self.name = name
        layout = layouts.Layout(lora, name, SEED)
        kind = diffusers.FluxTransformer2DModel
        source = trained.source(None, Model("miniature"))
        transformer = parallel.load_sharded(kind, source, world.device, world.dtype, world, layout)
        self.net = flux.Flux(transformer, None, None, world.device, world.dtype)
        self.parameters = layouts.trainable(transformer)
        lr = 10 * LR if lora else LR
        self.optimizer = adamw.optimizer_of(self.parameters, lr, 1e-4, name, world.device)

    def gradient(self, step):
        """Leave the mean gradient of four images, and return the loss of this process's."""
        generator = torch.Generator().manual_seed(step)
        txt = torch.randn(4, 16, 64, generator=generator)
        pooled = torch.randn(4, 64, generator=generator)
        start = torch.randn(4, 16, 64, generator=generator)
        mine = self.world.rows(4 // self.world.size)
        c = flow.Condition(txt[mine], pooled[mine], (4, 4))
        x0 = self.net.rollout(start[mine], c, torch.tensor([1.0, 0.6, 0.0]), 3.5)
        v = self.net.velocity(0.5 * (x0 + start[mine]), 0.5, c, 3.5)
        loss = (v * start[mine]).mean()
        loss.backward()
        layouts.finish_gradients(self.net.transformer)
        return loss.item()

    def update(self, step):
        loss = self.gradient(step)
        torch.nn.utils.clip_grad_norm_(self.parameters, 0.1)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def gradients(self):
        return {f"gradient {name}": tensors.full(parameter.grad).float()
                for name, parameter in self.net.transformer.named_parameters() if parameter.requires_grad}

    def weights(self):
        """What is trained, and with split the float32 numbers that its halves make."""
        found = {}
        for name, parameter in self.net.transformer.named_parameters():
            if parameter.requires_grad:
                whole = tensors.full(parameter.detach())
                if self.name == "split" and parameter in self.optimizer.state:
                    low = tensors.full(self.optimizer.state[parameter]["low"])
                    whole = adamw.join(whole, low.view(torch.int16))
                found[f"weight {name}"] = whole.float().clone()  # a later update leaves it as it is
        return found

    def facts(self):
        """Where all lies between two updates, and how."""
        transformer = self.net.transformer
        state = [value for each in self.optimizer.state.values() for value in each.values() if value.ndim]
        units = [m._get_fsdp_state()._fsdp_param_group for m in transformer.modules()
                 if isinstance(m, FSDPModule)]
        groups = [unit for unit in units if unit is not None]  # one whose parameters are all replicated
        return {
            "finite": weights_are_finite(transformer.parameters(), self.world),
            "dtypes": sorted({str(p.dtype).removeprefix("torch.") for p in transformer.parameters()}),
            "devices": sorted({str(t.device) for t in [*transformer.parameters(), *state]}),
            "resharded": not any(group.is_unsharded for group in groups),
            "offloaded": bool(groups) and all(isinstance(group.offload_policy, CPUOffloadPolicy) for group in groups),
            "state_bytes": sum(p.nbytes for p in self.parameters) + sum(t.nbytes for t in state),
            "all_bytes": sum(p.nbytes for p in transformer.parameters()) + sum(t.nbytes for t in state)}


def resumed(small, lora, folder):
    """Whether a checkpoint of this moment and an update more are an update without one, to the bit; and how
    many bytes the checkpoint has."""
    state = {"step": 2, "run": "test", "unlogged": None}
    checkpoint.save(folder, small.net.transformer, small.optimizer, state, small.world, 1)
    again = Small(small.world, lora, small.name)
    saved = Path(folder) / "checkpoints" / "step_00002"
    checkpoint.load(saved, again.net.transformer, again.optimizer)
    small.update(3)
    again.update(3)
    one, other = small.weights(), again.weights()
    return {"resumed": all(torch.equal(one[key], other[key]) for key in one),
            "saved_bytes": sum(file.stat().st_size for file in saved.glob("*.safetensors"))}


def main():
    folder = Path(sys.argv[1])
    if sys.argv[2:] == ["bf16"]:
        parallel.device_and_dtype = as_on_a_gpu
    world = parallel.World(mesh=True)
    facts = {}
    for lora, name in KINDS:
        small = Small(world, lora, name)
        if sys.argv[2:] == ["bf16"]:
            small.net.transformer.enable_gradient_checkpointing()
        losses = [small.gradient(1)]
        tensors = small.gradients()
        small.optimizer.zero_grad(set_to_none=True)
        losses += [small.update(step) for step in (1, 2)]
        tensors |= small.weights()
        facts[name] = small.facts() | {"losses": losses}
        if name in ("split", "offload", "fp8") and sys.argv[2:] != ["bf16"]:
            facts[name] |= resumed(small, lora, folder / name)
        if world.main:
            save_file(tensors, folder / f"{name}.safetensors")
    if world.main:
        (folder / "facts.json").write_text(json.dumps(facts))
    world.close()


if __name__ == "__main__":
    main()
