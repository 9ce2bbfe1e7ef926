"""Rewards whose network is an open_clip model: HPSv2.1, CLIP ViT-H/14, the miniature's, or one of your own.

Two layouts of weights are read: an open_clip folder (open_clip_config.json, open_clip_model.safetensors and,
unless it reads with OpenAI's, the files of a tokenizer); and HPSv2.1's, a .pt with a "state_dict", or what
would stand under that word alone, or a folder with that file.
"""

import logging
from contextlib import contextmanager
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F

from engine.errors import UserError
from engine.hub import fetched
from engine.model.configs import check_folder, fitting
from rewards import base

ARCH = "ViT-H-14"                         # HPSv2.1's, and the one that PickScore was made of
CHECKPOINT = "HPS_v2.1_compressed.pt"
CONFIG = "open_clip_config.json"
OPENAI_WORDS = 49408                      # known to a text tower whose config says nothing else
FITS = {"shortest": "crop", "squash": "stretch", "longest": "letterbox"}    # open_clip's resize_mode: our fit


class ClipReward(base.Reward):
    """An open_clip model. r is a cosine: about 0.28 for HPSv2.1."""

    def __init__(self, model, tokenizer, fit="crop"):
        super().__init__(model, image_size(model), model.visual.image_mean, model.visual.image_std)
        self.tokenizer = tokenizer
        self.fit = fit

    def features(self, pixels):
        """Prepared pixels [B, 3, size, size] -> unit f [B, D] float32."""
        return F.normalize(self.model.encode_image(pixels).float(), dim=-1)

    def encode_text(self, texts):
        """B texts -> unit C [B, D] float32; texts are truncated to the encoder's length, 77 tokens."""
        ids = self.tokenizer(texts).to(self.device)    # [B, 77]
        return F.normalize(self.model.encode_text(ids).float(), dim=-1)


def image_size(model):
    """How many pixels a side an open_clip model sees; its towers say it as a number or as (height, width)."""
    size = model.visual.image_size
    return size if isinstance(size, int) else size[0]


# ---------------------------------------------------------------------------------------------------- loading
def fetch(where):
    """The path of weights in one of the two layouts: `where` itself. Raises UserError if nothing is there."""
    return fetched(where, [])


def load(path, device, arch=ARCH):
    """The `ClipReward` of weights in one of the two layouts; arch: which of open_clip's a .pt has.

    Raises UserError for a folder that asks for code to be run, and whatever open_clip and torch raise for
    files that they cannot read.
    """
    if (path / CONFIG).exists():
        return load_folder(path, device)
    if path.is_dir():
        path = path / CHECKPOINT
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    state = state_of(path)
    must_be(arch, state)
    with quiet():
        model = open_clip.create_model(arch, pretrained=None)
        tokenizer = open_clip.get_tokenizer(arch)
    model.load_state_dict(state)
    return ClipReward(model.to(device), tokenizer, "letterbox")    # as HPSv2's evaluator prepares pictures


def state_of(path):
    """{name: tensor} of a .pt: what its "state_dict" holds, or itself. Raises UserError."""
    found = torch.load(path, map_location="cpu", weights_only=True)
    state = found.get("state_dict", found) if isinstance(found, dict) else None
    if not isinstance(state, dict) or not state or not all(map(torch.is_tensor, state.values())):
        raise UserError("no tensors by their names, nor any under the word state_dict")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def must_be(arch, state):
    """Raise UserError if weights are not of a vision transformer that open_clip names, in words that say of
    which they are. What is of no vision transformer is left to open_clip."""
    vision = open_clip.get_model_config(arch)["vision_cfg"]
    if not isinstance(vision["layers"], int):  # a ResNet
        return
    wanted = tower(vision["width"], vision["layers"], vision["patch_size"])
    patches = state.get("visual.conv1.weight")
    if patches is None or patches.ndim != 4:
        raise UserError(f"weights of open_clip's {arch} are expected, {wanted}; these have no "
                        f"visual.conv1.weight, but {sorted(state)[0]}")
    blocks = {name.split(".")[3] for name in state if name.startswith("visual.transformer.resblocks.")}
    found = tower(patches.shape[0], len(blocks), patches.shape[-1])
    if found != wanted:
        raise UserError(f"weights of open_clip's {arch} are expected, {wanted}; these are of {found}, which "
                        "need an open_clip folder to say so")


def tower(width, layers, patch):
    """A vision transformer in words."""
    return f"a vision tower {width} wide with {layers} layers and patches of {patch} pixels"


def load_folder(folder, device):
    """The `ClipReward` of an open_clip folder."""
    text_config = network_config(folder)["text_cfg"]
    with quiet():
        model = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True)
        tokenizer = tokenizer_of(folder, text_config)
    prepared = model.visual.preprocess_cfg
    if prepared["interpolation"] == "bilinear":
        raise UserError(f"{CONFIG} wants pictures resized bilinearly; they are resized bicubically here")
    return ClipReward(model.to(device), tokenizer, FITS[prepared["resize_mode"]])


def tokenizer_of(folder, text_config):
    """The tokenizer of an open_clip folder: its own if it has one, or OpenAI's. Raises UserError if that
    knows more words than the text tower."""
    if text_config.get("hf_tokenizer_name"):
        # The tokenizer is transformers', which asks on the terminal whether to run code unless it is told.
        return open_clip.get_tokenizer(f"local-dir:{folder}", trust_remote_code=False)
    length = text_config.get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH)
    if (folder / "tokenizer.json").exists():
        options = {"trust_remote_code": False} | text_config.get("tokenizer_kwargs", {})
        tokenizer = open_clip.tokenizer.HFTokenizer(folder, length, **options)
        last = max(tokenizer.tokenizer.get_vocab().values())
    else:
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
        last = tokenizer.vocab_size - 1
    words = text_config.get("vocab_size", OPENAI_WORDS)
    if last >= words:
        raise UserError(f"its tokenizer has {last + 1} words, and its text tower knows {words}, as {CONFIG} "
                        "says; put the right tokenizer.json beside that")
    return tokenizer


def network_config(folder):
    """model_cfg of an open_clip folder.

    Raises UserError if it is not one, or if a file of the folder asks for code to be run: weights come from
    strangers. transformers would run the code of a tokenizer whose options in open_clip's config say
    trust_remote_code, and would offer to run that of a config with auto_map, be it the folder's or that of a
    text model on the hub that hf_model_name names. timm would fetch a network by its name.
    """
    config = fitting(folder / CONFIG, check_folder(folder), {}).get("model_cfg")
    parts = [config.get(name) for name in ("vision_cfg", "text_cfg")] if isinstance(config, dict) else []
    if not parts or not all(isinstance(part, dict) for part in parts):
        raise UserError(f"{CONFIG} has no model_cfg with a text_cfg and a vision_cfg")
    for part in parts:
        for key in ("hf_model_name", "timm_model_name"):
            if part.get(key):
                raise UserError(f"{CONFIG} names a text model outside the folder ({key}); "
                                "only open_clip's own models are loaded")
    return config


@contextmanager
def quiet():
    """open_clip says what it loads to the root logger, and gives that a handler if it has none. Here it finds
    one that prints nothing; afterwards the root logger is as it was."""
    root = logging.getLogger()
    level = root.level
    handler = logging.NullHandler()
    root.addHandler(handler)
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
        root.removeHandler(handler)


# --------------------------------------------------------------------------------------------------- the plan
def image_network(where=None, arch=ARCH):
    """The `ImageNetwork` of an open_clip folder's own architecture; that of `arch` for anything else."""
    if where is not None and (Path(where) / CONFIG).exists():
        config = network_config(Path(where))
    else:
        config = open_clip.get_model_config(arch)
    # The class is chosen as create_model does, which itself cannot make fake tensors: it moves them.
    kind = open_clip.CLIP
    if config.pop("custom_text", False):
        kind = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP
    network = kind(**config).requires_grad_(False)
    return base.ImageNetwork(network, base.on_zeros(network.encode_image, image_size(network)), times=1)
