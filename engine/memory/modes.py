"""How a transformer's parameters are stored, and which of them are trained. So FLUX.1-dev trains on one card of 12 to
141 GB, or on many.

`--lora R` says what is trained. Without it all weights are (a full fine-tune); with it the weights stay
frozen, and thin matrices beside them learn (engine/model/lora.py).

`--memory NAME` says how it fits. What is trained differs in no other way:

    full   masters      float32 weights, gradients and Adam moments, divided among the GPUs by FSDP2
           split        bf16 weights, gradients and moments; the optimizer keeps the 16 bits that a float32
                        weight has beyond its bf16 one, so that small updates are not lost
           offload      as masters, but in the host's memory; a bf16 copy stays on the GPU over a rollout
           stream       as offload, but every block is copied to the GPU each time before it computes
    LoRA   bf16         frozen weights in bf16, whole on every GPU
           fp8          the large ones in float8, each row with a scale, divided among the GPUs; a matrix is cast
                        when it computes
           fp8-offload  as fp8, but in the host's memory

The adapters themselves are float32 masters. On a CPU all compute in float32.
"""

from engine.errors import UserError

# In the order in which they are preferred where several fit: those behind are slower.
FULL = ("masters", "split", "offload", "stream")
LORA = ("bf16", "fp8", "fp8-offload")
NAMES = ("auto", *FULL, *LORA)
ON_THE_HOST = ("offload", "stream", "fp8-offload")
HELD_ON_THE_GPU = ("masters", "split", "offload", "bf16")  # all that computes, over a rollout


def choices(rank):
    """The names of --memory for a LoRA of a rank, or for a full fine-tune (None or 0)."""
    return LORA if rank else FULL


def check(rank, name):
    """Raise UserError for a --memory that does not go with this --lora."""
    if name == "auto" or name in choices(rank):
        return
    what = "--lora R" if name in LORA else "a full fine-tune, without --lora"
    raise UserError(f"--memory {name}: is for {what}; give one of {', '.join(('auto', *choices(rank)))}")


def on_a_cpu(rank):
    """The --memory for one process on a CPU, which needs no FSDP2."""
    return "bf16" if rank else "masters"


def needs_mesh(name):
    """Whether a --memory needs FSDP2 even for one process on a CPU: to cast a block's parameters just before it
    computes, or to compute with copies of them."""
    return name not in ("auto", "masters", "bf16")


def branches_are_one_call(name, processes, checkpointing):
    """Whether the calls of an image's branches are one call of the network (engine/memory/one_call.py). That saves
    copies where parameters come from the host or from other processes. bf16 has all of them on every GPU. Without
    activation checkpointing the activations of two calls would take too much memory."""
    gathers = processes > 1 and name != "bf16"
    return name in ON_THE_HOST or gathers and checkpointing


def is_lean(name):
    """Whether a --memory is for a card so small that decoding and the rewards must save memory too. Then the VAE's
    decoder is recomputed in the backward, and only the image side of a reward is on the GPU, in bf16."""
    return name not in HELD_ON_THE_GPU
