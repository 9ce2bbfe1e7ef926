"""Small models in the layouts of the real ones, and pictures, for the tests."""

import json
import shutil
import zlib
from pathlib import Path

import diffusers
import numpy as np
import tokenizers
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

import prepare
import srpo_reward as sr
import train
from evaluation.metrics import geneval
from miniature import build_klein
from rewards import hpsv3, imagereward


# --------------------------------------------------------------------------------------- pictures and rewards
def photo(width, height, seed=0):
    """A picture with smooth and fine parts, as PIL."""
    g = np.random.default_rng(seed)
    small = Image.fromarray(g.integers(0, 255, (9, 9, 3), dtype=np.uint8)).resize((width, height), 3)
    noise = g.normal(0, 12, (height, width, 3))
    return Image.fromarray((np.asarray(small) + noise).clip(0, 255).astype(np.uint8))


def make_photographs(folder, sizes=((64, 64), (96, 64), (64, 100), (70, 70), (130, 90), (64, 64))):
    """Fill a folder with pictures of these widths and heights, each with its caption beside it."""
    folder.mkdir()
    colours = ("red", "green", "blue", "yellow", "white")
    for n, (width, height) in enumerate(sizes):
        photo(width, height, seed=n).save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text(f"a {colours[n % 5]} circle\n")
    return folder


def make_pickscore(folder):
    """Fill a folder in PickScore v1's layout, with the tokenizer of its processor."""
    shutil.copytree("miniature/tokenizer", folder, dirs_exist_ok=True)
    words = len(transformers.CLIPTokenizerFast.from_pretrained(folder))
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    text = dict(small, vocab_size=words, max_position_embeddings=16, eos_token_id=words - 1)
    vision = dict(small, image_size=224, patch_size=32)
    torch.manual_seed(0)
    model = transformers.CLIPModel(transformers.CLIPConfig(
        text_config=text, vision_config=vision, projection_dim=16, logit_scale_init_value=4.6))
    model.save_pretrained(folder)
    # As transformers of 2023 wrote it, with tables of positions: 16 of text, 49 patches and the class token.
    state = load_file(folder / "model.safetensors")
    state["text_model.embeddings.position_ids"] = torch.arange(16)[None]
    state["vision_model.embeddings.position_ids"] = torch.arange(50)[None]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def make_aesthetic(folder):
    """Fill a folder: a whole SigLIP, as the hub's, and the predictor's head beside it."""
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(0)
    transformers.SiglipModel(transformers.SiglipConfig(
        vision_config=dict(small, image_size=56, patch_size=14),
        text_config=dict(small, vocab_size=50))).save_pretrained(folder)
    sizes = [32, 1024, 128, 64, 16, 1]
    head = {}
    for i in range(5):
        scale = sizes[i] ** -0.5
        head[f"scoring_head.{2 * i}.weight"] = torch.randn(sizes[i + 1], sizes[i]) * scale
        head[f"scoring_head.{2 * i}.bias"] = torch.randn(sizes[i + 1]) * scale
    torch.save(head, folder / "aesthetic_predictor_v2_5.pth")
    return folder


# ------------------------------------------------------------------------------------- models of other people
PART = "transformer/diffusion_pytorch_model.safetensors"


def edit_json(file, **changed):
    """Set keys of a JSON file; None takes one away."""
    values = json.loads(file.read_text())
    for key, value in changed.items():
        if value is None:
            values.pop(key, None)
        else:
            values[key] = value
    file.write_text(json.dumps(values))


def make_foreign_flux(folder):
    """Fill a folder: a FLUX of 32 x 32 pixels that knows nothing of this project, with what the configs of
    others leave out."""
    shutil.copytree("miniature", folder, ignore=shutil.ignore_patterns(
        "srpo.json", "*.py", "*.txt", "*.md", "reward*", "judge", ".build", "__pycache__"))
    edit_json(folder / "vae" / "config.json", sample_size=32, shift_factor=None)
    edit_json(folder / "tokenizer" / "tokenizer_config.json", model_max_length=int(1e30))
    edit_json(folder / "tokenizer_2" / "tokenizer_config.json", model_max_length=None)
    return folder


def make_schnell(folder):
    """Fill a folder: a FLUX with FLUX.1-schnell's configs, no guidance embedding and a static shift of 1."""
    shutil.copytree("miniature", folder, ignore=shutil.ignore_patterns(
        "srpo.json", "*.py", "judge", "__pycache__"))
    edit_json(folder / "transformer" / "config.json", guidance_embeds=False)
    edit_json(folder / "scheduler" / "scheduler_config.json", use_dynamic_shifting=False, shift=1.0)
    edit_json(folder / "tokenizer_2" / "tokenizer_config.json", model_max_length=512)
    state = {name: tensor for name, tensor in load_file(folder / PART).items() if "guidance" not in name}
    save_file(state, folder / PART, {"format": "pt"})
    return folder


def make_foreign_reward(folder):
    """Fill a folder: an open_clip model whose config does not name the tokenizer beside it."""
    shutil.copytree("miniature/reward", folder)
    config = json.loads((folder / "open_clip_config.json").read_text())
    del config["model_cfg"]["text_cfg"]["hf_tokenizer_name"]
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


def released_names(state):
    """The tensors of a FluxTransformer2DModel under the names that black-forest-labs gave them, q, k and v in
    one, and the last shift before its scale."""
    state = dict(state)
    out = {}

    def take(theirs, *ours):
        for kind in ("weight", "bias"):
            if f"{ours[0]}.{kind}" in state:
                out[f"{theirs}.{kind}"] = torch.cat([state.pop(f"{name}.{kind}") for name in ours])

    def norms(theirs, query, key):
        out[f"{theirs}.query_norm.scale"] = state.pop(f"{query}.weight")
        out[f"{theirs}.key_norm.scale"] = state.pop(f"{key}.weight")

    for theirs, ours in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance")):
        take(f"{theirs}_in.in_layer", f"time_text_embed.{ours}_embedder.linear_1")
        take(f"{theirs}_in.out_layer", f"time_text_embed.{ours}_embedder.linear_2")
    take("img_in", "x_embedder")
    take("txt_in", "context_embedder")
    take("final_layer.linear", "proj_out")
    for kind in ("weight", "bias"):
        scale, shift = state.pop(f"norm_out.linear.{kind}").chunk(2)
        out[f"final_layer.adaLN_modulation.1.{kind}"] = torch.cat([shift, scale])
    for i in range(100):
        block, ours = f"double_blocks.{i}", f"transformer_blocks.{i}"
        if f"{ours}.norm1.linear.weight" in state:
            take(f"{block}.img_mod.lin", f"{ours}.norm1.linear")
            take(f"{block}.txt_mod.lin", f"{ours}.norm1_context.linear")
            take(f"{block}.img_attn.qkv", *(f"{ours}.attn.to_{x}" for x in "qkv"))
            take(f"{block}.txt_attn.qkv", *(f"{ours}.attn.add_{x}_proj" for x in "qkv"))
            take(f"{block}.img_attn.proj", f"{ours}.attn.to_out.0")
            take(f"{block}.txt_attn.proj", f"{ours}.attn.to_add_out")
            for side, mlp in (("img", "ff"), ("txt", "ff_context")):
                take(f"{block}.{side}_mlp.0", f"{ours}.{mlp}.net.0.proj")
                take(f"{block}.{side}_mlp.2", f"{ours}.{mlp}.net.2")
            norms(f"{block}.img_attn.norm", f"{ours}.attn.norm_q", f"{ours}.attn.norm_k")
            norms(f"{block}.txt_attn.norm", f"{ours}.attn.norm_added_q", f"{ours}.attn.norm_added_k")
        block, ours = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        if f"{ours}.norm.linear.weight" in state:
            take(f"{block}.linear1", *(f"{ours}.attn.to_{x}" for x in "qkv"), f"{ours}.proj_mlp")
            take(f"{block}.linear2", f"{ours}.proj_out")
            take(f"{block}.modulation.lin", f"{ours}.norm.linear")
            norms(f"{block}.norm", f"{ours}.attn.norm_q", f"{ours}.attn.norm_k")
    assert not state
    return out


# --------------------------------------------------------------------------------- scorers that are no reward
DEQA = json.loads((Path(__file__).parent / "golden" / "deqa.json").read_text())


def deqa_state():
    """The tensors of a tiny DeQA-Score, each made from its key alone: the golden numbers are of these."""
    state = {}
    for key, shape in DEQA["shapes"].items():
        n = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
        if len(shape) == 1:
            n = 0.3 * n + key.endswith("weight")
        elif key.endswith("weight") and "embed_tokens" not in key:
            n = n / np.prod(shape[1:]) ** 0.5 * 1.25
        state[key] = torch.from_numpy(np.asarray(n, dtype=np.float32))
    return state


def make_deqa(folder):
    """Fill a folder: a tiny DeQA-Score in one safetensors file."""
    (folder / "config.json").write_text(json.dumps(DEQA["config"]))
    save_file(deqa_state(), folder / "model.safetensors")
    return folder


def geneval_metadata():
    """Lines of a file that has GenEval's form, all about dogs."""
    entry = {"prompt": "a photo of a dog", "include": [{"class": "dog", "count": 1}]}
    return [{"tag": tag, **entry} for tag, n in geneval.TASKS.items() for _ in range(n)]


def write_lines(path, entries):
    """Write values as JSON, one a line; the path."""
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def make_geneval(folder):
    """Fill a folder: metadata, a random Mask2Former as the hub has it (names and extra tensors of an older
    transformers), the miniature's open_clip."""
    write_lines(folder / geneval.METADATA, geneval_metadata())
    shutil.copytree("miniature/reward", folder / "clip")
    torch.manual_seed(0)
    swin = transformers.SwinConfig(embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2],
                                   out_features=["stage1", "stage2", "stage3", "stage4"])
    config = transformers.Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, num_queries=10,
        dim_feedforward=32, encoder_feedforward_dim=32, encoder_layers=1, decoder_layers=2,
        num_attention_heads=4, id2label=dict(enumerate(geneval.CLASSES)),
        label2id={name: i for i, name in enumerate(geneval.CLASSES)})
    geneval.Detector(config).save_pretrained(folder / "mask2former")
    path = folder / "mask2former" / "model.safetensors"
    state = {k: v for k, v in load_file(path).items() if "swin.layernorm" not in k}
    block = "model.pixel_level_module.encoder.encoder.layers.0.blocks.0.attention.self."
    assert block + "query.weight" in state
    state |= {"criterion.empty_weight": torch.ones(81), block + "relative_position_index": torch.zeros(1)}
    save_file(state, path, {"format": "pt"})
    return folder


def imagereward_shapes(width=128, text=64, depth=2, patch=16, side=3, words=40, positions=40):
    """{name: shape} of ImageReward.pt, at a tiny size: side x side patches, width channels of the picture and
    `text` of the words."""
    out = {}

    def linear(name, i, o):
        out.update({f"{name}.weight": (o, i), f"{name}.bias": (o,)})

    def norm(name, n):
        out.update({f"{name}.weight": (n,), f"{name}.bias": (n,)})

    eye = "blip.visual_encoder"
    reader = "blip.text_encoder"
    out[f"{eye}.cls_token"] = (1, 1, width)
    out[f"{eye}.pos_embed"] = (1, side ** 2 + 1, width)
    out[f"{eye}.patch_embed.proj.weight"] = (width, 3, patch, patch)
    out[f"{eye}.patch_embed.proj.bias"] = (width,)
    out[f"{reader}.embeddings.word_embeddings.weight"] = (words, text)
    out[f"{reader}.embeddings.position_embeddings.weight"] = (positions, text)
    norm(f"{eye}.norm", width)
    norm(f"{reader}.embeddings.LayerNorm", text)
    for i in range(depth):
        block = f"{eye}.blocks.{i}"
        norm(f"{block}.norm1", width)
        norm(f"{block}.norm2", width)
        linear(f"{block}.attn.qkv", width, 3 * width)
        linear(f"{block}.attn.proj", width, width)
        linear(f"{block}.mlp.fc1", width, 4 * width)
        linear(f"{block}.mlp.fc2", 4 * width, width)
        layer = f"{reader}.encoder.layer.{i}"
        for part, source in (("attention", text), ("crossattention", width)):
            linear(f"{layer}.{part}.self.query", text, text)
            linear(f"{layer}.{part}.self.key", source, text)
            linear(f"{layer}.{part}.self.value", source, text)
            linear(f"{layer}.{part}.output.dense", text, text)
            norm(f"{layer}.{part}.output.LayerNorm", text)
        linear(f"{layer}.intermediate.dense", text, 4 * text)
        linear(f"{layer}.output.dense", 4 * text, text)
        norm(f"{layer}.output.LayerNorm", text)
    head = [text, 1024, 128, 64, 16, 1]
    for n, i, o in zip((0, 2, 4, 6, 7), head[:-1], head[1:], strict=True):
        linear(f"mlp.layers.{n}", i, o)
    linear("blip.vision_proj", width, 256)
    linear("blip.text_proj", text, 256)
    return out


def make_imagereward(folder):
    """Fill a folder: a tiny ImageReward.pt and a tokenizer beside it. A tensor is small noise, made from its
    name alone, since the golden numbers are of these; norms are around 1."""
    state = {}
    for name, shape in imagereward_shapes().items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        state[name] = 0.1 * torch.randn(shape, generator=generator)
        if len(shape) == 1 and name.endswith("weight"):
            state[name] += 1
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    torch.save(state, folder / imagereward.FILE)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] + [f"w{n}" for n in range(5, 40)]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return folder


def hpsv3_shapes(words, hidden=256, depth=2, eye=80, side=14):
    """{name: shape} of HPSv3.safetensors, at a tiny size: two language heads that share a key, one head of the eye."""
    out = {}

    def linear(name, i, o, bias=True):
        out.update({f"{name}.weight": (o, i)} | ({f"{name}.bias": (o,)} if bias else {}))

    def norm(name, n):
        out.update({f"{name}.weight": (n,), f"{name}.bias": (n,)})

    out["visual.patch_embed.proj.weight"] = (eye, 3, 2, side, side)
    for i in range(depth):
        block = f"visual.blocks.{i}"
        norm(f"{block}.norm1", eye)
        norm(f"{block}.norm2", eye)
        linear(f"{block}.attn.qkv", eye, 3 * eye)
        linear(f"{block}.attn.proj", eye, eye)
        linear(f"{block}.mlp.fc1", eye, 4 * eye)
        linear(f"{block}.mlp.fc2", 4 * eye, eye)
        layer = f"model.layers.{i}"
        linear(f"{layer}.self_attn.q_proj", hidden, hidden)
        linear(f"{layer}.self_attn.k_proj", hidden, 128)
        linear(f"{layer}.self_attn.v_proj", hidden, 128)
        linear(f"{layer}.self_attn.o_proj", hidden, hidden, bias=False)
        linear(f"{layer}.mlp.gate_proj", hidden, 300, bias=False)
        linear(f"{layer}.mlp.up_proj", hidden, 300, bias=False)
        linear(f"{layer}.mlp.down_proj", 300, hidden, bias=False)
        out[f"{layer}.input_layernorm.weight"] = out[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
    norm("visual.merger.ln_q", eye)
    linear("visual.merger.mlp.0", 4 * eye, 4 * eye)
    linear("visual.merger.mlp.2", 4 * eye, hidden)
    out["model.embed_tokens.weight"] = out["lm_head.weight"] = (words, hidden)
    out["model.norm.weight"] = (hidden,)
    for n, i, o in zip("035", (hidden, 1024, 16), (1024, 16, 2), strict=True):
        linear(f"rm_head.{n}", i, o)
    return out


def make_hpsv3(folder):
    """Fill a folder: a tiny HPSv3.safetensors, and a tokenizer of bytes in Qwen2-VL's layout beside it. A tensor is
    small noise, made from its name alone, since the golden numbers are of these; norms are around 1."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = transformers.Qwen2Tokenizer(vocab={letter: n for n, letter in enumerate(letters)}, merges=[])
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"],
                         special_tokens=True)
    tokenizer.save_pretrained(folder)
    state = {}
    for name, shape in hpsv3_shapes(len(tokenizer) + 1).items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        state[name] = 0.1 * torch.randn(shape, generator=generator)
        if "norm" in name and name.endswith("weight") or name.endswith("ln_q.weight"):
            state[name] += 1
    save_file(state, folder / hpsv3.FILE)
    return folder


# ------------------------------------------------------------------------------------------ one update of
# SRPO
class Fixed:
    """A reward that is a dot product of image_features(images) [B, D] with given C0, C1, C2 [B, D]."""
    is_dot_product = True

    def __init__(self, image_features, *C):
        self.image_features = image_features
        self.C = C

    def condition(self, texts, n):
        return self.C[n][:len(texts[n])]


def fixed(image_features, *C):
    """The `srpo_reward.Rewards` of one `Fixed`."""
    return sr.Rewards({"fixed": (Fixed(image_features, *C), 1.0)})


def a_batch(prompts, c, x0, eps, middles, start=None, words=("realistic photo", "CG render")):
    """A `prepare.Batch`; middles is a list of n lists of B whole numbers, or of tensors."""
    middles = [torch.as_tensor(m) for m in middles]
    return prepare.Batch(prompts, c, x0, start, eps, sr.texts_of(prompts, *words), middles)


def backward(a, net, reward, batch, times=1):
    """Run through `train.srpo` with backward, as the loop does, the gradients divided by `times`; the
    terms."""
    terms = []
    for loss, term in train.srpo(a, net, reward, batch):
        (loss / times).backward()
        terms.append(term)
    return terms


def make_klein(folder):
    """Fill a folder: a FLUX.2-klein with random weights, in its layout: 24 text tokens, and latents of 8 channels whose
    tokens have statistics of their own."""
    torch.manual_seed(0)
    words = build_klein.tokenizer()
    words.model_max_length = 24
    text = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
        vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.5,
        pad_token_id=words.pad_token_id, bos_token_id=None, eos_token_id=words.pad_token_id))
    vae = diffusers.AutoencoderKLFlux2(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[8, 8, 8, 8], layers_per_block=1, latent_channels=8, norm_num_groups=4, sample_size=64)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=32, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=96, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    diffusers.Flux2KleinPipeline(scheduler, vae, text, words, transformer).save_pretrained(folder)
    return folder
