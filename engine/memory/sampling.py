"""The flags that sample.py and evaluate.py share, and what --memory does there: how the transformer is stored while it
only samples.

    bf16         whole on the GPU
    fp8          the large weights in float8; a block is cast before it computes
    fp8-offload  as fp8, but in the host's memory

They are a LoRA's layouts (engine/memory/modes.py), so a card can sample with what it has trained. In float8 the
pictures differ a little from those in bf16.
"""

from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.command_line import MODEL, extent, or_off, real, sides, whole
from engine.errors import UserError
from engine.memory import modes
from engine.memory.cards import CONTEXT, because, this_machine
from engine.memory.counts import bytes_of, create, forward, latents, most_alive, shapes_of
from engine.memory.layouts import Layout
from engine.memory.plan import GIB, pinned, stored_by
from engine.model import trained

NAMES = ("auto", *modes.LORA)


def add_flags(add):
    """Add the flags of sampling. add: the method of an argparse parser."""
    add("--model", default="black-forest-labs/FLUX.1-dev", help=MODEL)
    add("--size", type=extent, default=1024, help="side of the pictures, pixels, or WIDTHxHEIGHT [authors' answer for "
        "Table 1]")
    add("--eval-steps", type=whole(1), default=50, help="sampling steps [paper 4.1]")
    add("--guidance", type=real(0), default=3.5, help="distilled guidance [FLUX.1-dev]")
    add("--cfg", type=or_off(real(1)), help="classifier-free guidance of a model that is not distilled, g of "
        "flow.guided, two calls a step; off: one call [FLUX.2-klein-base: 4]")
    add("--seed", type=whole(0, 2**30), default=0, help="prompt i is sampled from noise seed + i, with any weights")
    add("--batch", type=whole(1), default=1, help="pictures sampled at a time")
    add("--memory", choices=NAMES, default="auto", help="how the transformer fits the card: bf16, fp8 or fp8-offload; "
        "auto: the first that the plan says fits; with float8 the pictures differ a little")


class Job(NamedTuple):
    """What the memory of sampling depends on."""
    model: str            # its name, for messages
    transformer: dict     # the transformer's config
    vae: dict             # the VAE's config
    text_tokens: int      # of a prompt
    text_parameters: int  # of the text encoders, which are freed before the transformer is loaded
    size: int             # side of a picture, pixels; or [width, height]
    image_tokens: int     # of a picture
    batch: int            # pictures at a time
    guided: bool          # classifier-free guidance: two calls of the transformer as one batch


class Prediction(NamedTuple):
    """What sampling takes, in bytes: on the GPU in two phases, and on the host."""
    peak_in_texts: float
    peak_in_pictures: float
    host: float

    @property
    def peak(self):
        return max(self.peak_in_texts, self.peak_in_pictures)


def job(model, size, batch, cfg=None):
    """The `Job` of a `Model`. cfg: the flag."""
    configs = model.configs
    rows, columns = model.grid(*sides(size))
    return Job(model.name, configs.transformer, configs.vae, configs.text_tokens, configs.text_parameters, size,
               rows * columns, batch, cfg is not None)


def predictions(job):
    """{--memory: its `Prediction`}, in order of preference."""
    dtype = torch.bfloat16
    with FakeTensorMode():
        transformer = create(job.transformer, dtype)
        calling = most_alive(transformer, forward, transformer, job.image_tokens, job.text_tokens, dtype)
        calling *= job.batch * (2 if job.guided else 1)
        vae = create(job.vae, dtype)
        decoding = job.batch * most_alive(vae, vae.decode, latents(vae, job, dtype))
        frozen = bytes_of(vae)
        shapes, block = shapes_of(transformer)
    whole = sum(shape.numel(1) for shape in shapes)
    stored = stored_by(shapes, 1)
    cast = dtype.itemsize * max(shape.numel(1) for shape in shapes)  # of the matrix that computes
    texts = dtype.itemsize * job.text_parameters

    def taken(parameters, copies, host=0):
        # The transformer is called, then the VAE. What one call held lies in pieces too small for the decoder.
        return Prediction(texts, parameters + frozen + calling + max(copies, decoding), host)

    return {"bf16": taken(dtype.itemsize * whole, 0), "fp8": taken(sum(stored), cast),
            "fp8-offload": taken(0, cast + block, pinned(stored))}


def settle(job, name, world):
    """Choose --memory auto, or check any other, before anything is loaded. Returns (--memory, why in one line, or
    None). Raises UserError, with flags that would fit, if it does not fit."""
    if world.device.type == "cpu":
        return ("bf16" if name == "auto" else name), None
    machine = this_machine(world)
    found = predictions(job)
    for tried in found if name == "auto" else [name]:
        if machine.has_room(found[tried]):
            return tried, because(tried, found[tried], machine, list(found)) if name == "auto" else None
    others = [other for other in found if machine.has_room(found[other])]
    seen = min(found.values(), key=lambda each: each.peak) if name == "auto" else found[name]
    smaller = "a smaller --batch" if job.batch > 1 else "a smaller --size"
    raise UserError(f"--model {job.model}, sampling with --memory {name}: predicted peak "
                    f"{(seen.peak + CONTEXT) / GIB:.1f} GiB a GPU and {seen.host / GIB:.0f} of the host; free are "
                    f"{machine.card / GIB:.1f} and {machine.host_gib()}; what helps: "
                    + ", or ".join([f"--memory {other}" for other in others] or [smaller]))


def made(name):
    """What a --memory adds to the description of pictures: only float8 changes them."""
    return {} if name == "bf16" else {"memory": "float8"}


def how(name, weights, model, world):
    """(world, `Layout`) with which `flow.load` stores a transformer that only samples; (None, None) for all of it in
    bf16, which needs no FSDP2. Each process has the transformer for itself.

    With float8 a LoRA is read into adapters: they stay exact, where weights that it is merged into would be rounded. A
    LoRA that fits no adapters is merged all the same."""
    if name == "bf16":
        return None, None
    return world.alone(), Layout(trained.rank_of(weights, model), name, seed=0, trains=False)
