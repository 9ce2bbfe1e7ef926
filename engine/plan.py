"""What an update costs, predicted on any machine with no weights: `python train.py --plan --world-size 8`.

FLOP are counted on meta tensors, saved activations on fake tensors, both on the real modules; the rest is
arithmetic: FSDP2 with float32 masters holds 16 bytes per parameter over the ranks that shard it (parameter,
gradient, two moments).
"""

import json
from pathlib import Path

import open_clip
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import SiglipVisionConfig, SiglipVisionModel
from transformers.initialization import no_init_weights

from flux import pixels_per_token
from srpo_reward import parse_rewards

GIB, TERA = 2**30, 1e12
# dense bf16 TFLOP/s, data sheets
PEAK = {"H200": 989, "H100": 989, "A100": 312, "H20": 148, "L40S": 362, "RTX 4090": 165}


def count_flop(run):
    """FLOP of run(), which computes on meta tensors."""
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        run()
    return counter.get_total_flops()


def count_saved(run, parameters):
    """(bytes that run() saves for a backward, parameters left out; the largest single one), on fake tensors:
    as on a GPU, attention keeps its inputs and output, not its matrix."""
    own, seen = {p.untyped_storage()._cdata for p in parameters}, {}

    def pack(x):
        storage = x.untyped_storage()
        if storage._cdata not in own:
            seen[storage._cdata] = storage  # kept, so that no other storage takes its address
        return x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run()
    sizes = [s.nbytes() for s in seen.values()]
    return sum(sizes), max(sizes)


def new(kind, config, dtype):
    """A module of a diffusers config, created in dtype (under meta or fake mode it costs nothing)."""
    torch.set_default_dtype(dtype)
    try:
        return kind.from_config(config)
    finally:
        torch.set_default_dtype(torch.float32)


def forward(transformer, tokens, text_tokens, dtype):
    """One call of a FLUX transformer on zeros: `tokens` image and `text_tokens` text tokens, one image."""
    c, zeros = transformer.config, lambda *shape: torch.zeros(*shape, dtype=dtype)
    return transformer(
        hidden_states=zeros(1, tokens, c.in_channels), timestep=torch.zeros(1),
        pooled_projections=zeros(1, c.pooled_projection_dim),
        guidance=torch.zeros(1) if c.guidance_embeds else None,
        encoder_hidden_states=zeros(1, text_tokens, c.joint_attention_dim),
        txt_ids=torch.zeros(text_tokens, 3), img_ids=torch.zeros(tokens, 3), return_dict=False)[0]


def transformer_flop(config, tokens, text_tokens):
    """FLOP of one forward of the transformer for one image."""
    with torch.device("meta"):
        transformer = new(FluxTransformer2DModel, config, torch.bfloat16)
    with torch.no_grad():
        return count_flop(lambda: forward(transformer, tokens, text_tokens, torch.bfloat16))


def update_flop(config, tokens, text_tokens, a):
    """FLOP of one update for one image: the transformer's rollout, and its calls with a gradient (forward,
    twice that backward, and once more forward under activation checkpointing). Returns (rollout, update)."""
    once, calls = transformer_flop(config, tokens, text_tokens), a.injections * len(a.branches)
    return a.rollout_steps * once, calls * once * (4 if a.checkpointing else 3)


def achieved(flop, seconds, device):
    """{"tflop_per_second"} of an update and, on a GPU, its share of the card's peak where that is known, and
    the peak memory so far in GiB."""
    rate = {"tflop_per_second": round(flop / seconds / TERA, 4)}
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        peak = next((p for card, p in PEAK.items() if card in name), None)
        rate |= {"share_of_peak": peak and round(rate["tflop_per_second"] / peak, 4),
                 "peak_gib": round(torch.cuda.max_memory_allocated(device) / GIB, 2)}
    return rate


FLUX_DEV = (  # FluxTransformer2DModel's own defaults are FLUX.1-dev's, but for the guidance embedding
    {"guidance_embeds": True},
    {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
     "latent_channels": 16, "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
     "use_quant_conv": False, "use_post_quant_conv": False},
    512)


SIGLIP = dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16,
              image_size=384, patch_size=14)  # Aesthetic v2.5's, so400m


def configs(model):
    """(transformer config, VAE config, text tokens): a model folder's own, else FLUX.1-dev's."""
    folder = Path(model)
    read = lambda name: json.loads((folder / name).read_text())
    transformer, vae, text_tokens = FLUX_DEV if not folder.exists() else (
        read("transformer/config.json"), read("vae/config.json"),
        read("tokenizer_2/tokenizer_config.json")["model_max_length"])
    return transformer, vae, text_tokens


def reward_networks(spec):
    """[(network, one call of its image side, times it is called for an image)] of --reward, in float32; 0
    times for one that is held out. An open_clip folder's own architecture, else ViT-H/14, HPSv2.1's and
    PickScore's, or SigLIP's."""
    networks = []
    for name, where, weight in parse_rewards(spec).values():
        if name == "aesthetic":  # twice: clean and noised (S1)
            with no_init_weights():
                network = SiglipVisionModel(SiglipVisionConfig(**SIGLIP))
            look, passes = (lambda x, n=network: n(x).pooler_output), 2
            side = (SIGLIP["image_size"],) * 2
        else:
            own = Path(where or name) / "open_clip_config.json"
            network = open_clip.model.CLIP(**(json.loads(own.read_text())["model_cfg"] if own.exists()
                                              else open_clip.get_model_config("ViT-H-14")))
            look, passes, side = network.encode_image, 1, network.visual.image_size
            side = side if isinstance(side, tuple) else (side, side)
        call = lambda grad=False, look=look, side=side: look(torch.zeros(1, 3, *side, requires_grad=grad))
        networks.append((network.requires_grad_(False), call, passes if weight else 0))
    return networks


def predict(a, world_size, compute_dtype):
    """The plan of one update of flags `a` (a.batch images a process) on world_size processes: a dict of
    numbers, memory in bytes per process, FLOP per process, bytes received per process."""
    config, vae_config, text_tokens = configs(a.model)
    unit = pixels_per_token(vae_config)
    if a.size % unit or a.size < unit:
        raise ValueError(f"--size {a.size}: must be a multiple of {unit} pixels for this model")
    width, side = compute_dtype.itemsize, a.size // unit
    tokens, B, calls = side * side, a.batch, a.injections * len(a.branches)
    with FakeTensorMode():
        transformer = new(FluxTransformer2DModel, config, compute_dtype)
        parameters = sum(p.numel() for p in transformer.parameters())
        blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
        largest = max(sum(p.numel() for p in block.parameters()) for block in blocks)
        run = lambda: forward(transformer, tokens, text_tokens, compute_dtype)
        activations, _ = count_saved(run, transformer.parameters())
        one_block = activations / len(blocks)
        if a.checkpointing:
            transformer.enable_gradient_checkpointing()
            activations = count_saved(run, transformer.parameters())[0] + one_block
        vae = new(AutoencoderKL, vae_config, compute_dtype).requires_grad_(False)
        rewards = reward_networks(a.reward)
        latent = 2 * side
        z = torch.zeros(1, vae.config.latent_channels, latent, latent, dtype=compute_dtype,
                        requires_grad=True)
        frozen = sum(p.nbytes for m in (vae, *(network for network, _, _ in rewards)) for p in m.parameters())
        decode = lambda: vae.decode(z).sample
        path = count_saved(decode, vae.parameters())[0] + sum(
            times * count_saved(lambda: call(grad=True), network.parameters())[0]
            for network, call, times in rewards if times)
    with torch.device("meta"):
        vae, rewards = new(AutoencoderKL, vae_config, compute_dtype), reward_networks(a.reward)
    with torch.no_grad():
        decode_flop = count_flop(lambda: vae.decode(torch.zeros(1, vae.config.latent_channels, latent, latent,
                                                                dtype=compute_dtype)))
        reward_flop = sum(times * count_flop(call) for _, call, times in rewards if times)
    rollout, update = update_flop(config, tokens, text_tokens, a)
    shards = max(1, world_size // a.replicas)
    alone = shards == 1
    state = {"parameters": 4 * parameters / shards, "gradients": 4 * parameters / shards,
             "optimizer": 8 * parameters / shards}
    # a block and the next one gathered, the block's gradient, its float32 copy on the way to the reduction
    gathered = 0 if compute_dtype == torch.float32 and alone else largest * (2 * width + width + 4)
    peak_update = sum(state.values()) + B * (activations + path) + gathered + frozen
    peak_rollout = sum(state.values()) - state["gradients"] + frozen + (0 if alone else width * parameters)
    others = (shards - 1) / shards
    return {"all_parameters": parameters, **state, "activations": B * activations, "gathered": gathered,
            "reward path": B * path, "frozen": frozen, "peak in the update": peak_update,
            "peak in the rollout": peak_rollout, "peak": max(peak_update, peak_rollout),
            "rollout": B * rollout, "update": B * update,
            "decode": B * calls * 2 * decode_flop, "reward": B * calls * 2 * reward_flop,
            "received": others * parameters * (width * (1 + 2 * calls) + 4 * calls)}


def advice(peak, card, a, world_size):
    """ValueError if a predicted peak of bytes does not fit a card's bytes, with the flags that would help."""
    if peak <= card:
        return
    more = world_size
    while predict(a, more, torch.bfloat16)["peak"] > card and more < 64:
        more *= 2
    helps = [] if a.checkpointing else ["--checkpointing"]
    helps += [f"{more} GPUs (torchrun --nproc_per_node)"] if more <= 64 and more > world_size else []
    helps += ["a smaller --batch"] if a.batch > 1 else ["a smaller --size"]
    raise ValueError(f"--model {a.model}: predicted peak {peak / GIB:.0f} GiB a GPU, "
                     f"this one has {card / GIB:.0f}; what helps: " + ", or ".join(helps))


def must_fit(a, world):
    """Before anything is loaded: ValueError if the plan does not fit this GPU. On a CPU nothing is
    checked."""
    if world.device.type == "cuda":
        total = torch.cuda.get_device_properties(world.device).total_memory
        advice(predict(a, world.size, torch.bfloat16)["peak"], total, a, world.size)


def show(a):
    """Print the plan for --world-size processes; seconds for --card at --share of its peak."""
    world_size, card, share = a.world_size, a.card, a.share
    if card not in PEAK:
        raise ValueError(f"--card {card}: its peak is not known here; known are {', '.join(PEAK)}")
    plan = predict(a, world_size, torch.bfloat16)
    gib = lambda k: f"{plan[k] / GIB:8.1f} GiB" if plan[k] >= GIB / 10 else f"{plan[k] / 2**20:8.1f} MiB"
    tera = lambda k: f"{plan[k] / TERA:8.1f} TFLOP" if plan[k] >= TERA / 10 else f"{plan[k] / 1e9:8.1f} GFLOP"
    print(f"predicted, not measured: {a.model}, {plan['all_parameters'] / 1e6:,.1f} M parameters, "
          f"{a.size} x {a.size} pixels, {a.batch} image(s) a process, {world_size} processes, "
          f"activation checkpointing {'on' if a.checkpointing else 'off'}")
    print("\nmemory per process")
    for k in ("parameters", "gradients", "optimizer", "activations", "gathered", "reward path", "frozen",
              "peak in the update", "peak in the rollout"):
        print(f"    {k:20}{gib(k)}")
    print("\nwork per process and update")
    parts = ("rollout", "update", "decode", "reward")
    total = sum(plan[k] for k in parts)
    for k in parts:
        print(f"    {k:20}{tera(k)} {100 * plan[k] / total:6.1f} %")
    print(f"    {'received':20}{plan['received'] / 1e9:8.1f} GB")
    plan["total"], seconds = total, total / TERA / (PEAK[card] * share)
    print(f"\n{tera('total').strip()} an update: {seconds:.3g} s on {card} at {share:.0%} of its "
          f"{PEAK[card]} TFLOP/s, communication apart")
