"""How a transformer's parameters lie in memory, and which of them are trained: so one card of 12 to 141 GB
trains FLUX.1-dev, or many do.

`--lora R` says what is trained. Without it all weights are (a full fine-tune); with it the weights stay
frozen, and thin matrices beside them learn (engine/model/lora.py).

`--memory NAME` says how it fits. What is trained differs in no other way:

    full   masters      float32 weights, gradients and Adam moments, divided among the GPUs by FSDP2
           split        bf16 weights, gradients and moments; the optimizer keeps the 16 bits that a float32
                        weight has beyond its bf16 one, so that small updates are not lost
           offload      as masters, but in the host's memory; a bf16 copy stays on the GPU over a rollout
           stream       as offload, but every block is copied to the GPU whenever its turn comes
    LoRA   bf16         frozen weights in bf16, whole on every GPU
           fp8          the large ones in float8, divided among the GPUs; a block is cast when its turn comes
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
    """Raise UserError for a --memory that is not for what is trained."""
    if name == "auto" or name in choices(rank):
        return
    what = "--lora R" if name in LORA else "a full fine-tune, without --lora"
    raise UserError(f"--memory {name}: is for {what}; here it may be {', '.join(('auto', *choices(rank)))}")


def on_a_cpu(rank):
    """The --memory that computes without FSDP2, in one process on a CPU."""
    return "bf16" if rank else "masters"


def needs_mesh(name):
    """Whether one process on a CPU needs FSDP2 for it, as it does on a GPU: to cast parameters when a block's
    turn comes, or to keep them apart from the copies that compute."""
    return name not in ("auto", "masters", "bf16")


def is_lean(name):
    """Whether a --memory is for a card so small that decoding and the rewards must save too: the VAE's
    decoder is recomputed in the backward, and of a reward the image side alone is on the GPU, in bf16."""
    return name not in HELD_ON_THE_GPU


def stored_in_fp8(name, parameter):
    """Whether --memory fp8 stores a frozen parameter in float8: the matrices of the blocks."""
    return parameter.ndim == 2 and "transformer_blocks." in name
