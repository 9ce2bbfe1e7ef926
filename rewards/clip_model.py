"""Rewards whose network is an open_clip model: HPSv2.1, CLIP ViT-H/14, the miniature's, or a user's own.

Two layouts of weights are read. The first is an open_clip folder: open_clip_config.json, open_clip_model.safetensors
and the files of its tokenizer; without these, OpenAI's tokenizer is used. The second is HPSv2.1's: a .pt that holds
the tensors, either directly or under "state_dict", or a folder with that file.
"""

import logging
from contextlib import contextmanager
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F

from engine.errors import UserError
from engine.hub import fetched
from engine.memory.parallel import moved
from engine.model.configs import check_dtypes, check_folder, fitting, must_be_floats
from rewards import base

ARCH = "ViT-H-14"                         # the architecture of HPSv2.1 and of PickScore
CHECKPOINT = "HPS_v2.1_compressed.pt"
CONFIG = "open_clip_config.json"
OPENAI_WORDS = 49408                      # size of the vocabulary if the config does not give it
LEAST_KNOWN = 0.9                         # a tower may know some words more, so that their number is round
FITS = {"shortest": "crop", "squash": "stretch", "longest": "letterbox"}    # {open_clip's resize_mode: our fit}


class ClipReward(base.DotProduct):
    """An open_clip model. r is a cosine: about 0.28 for HPSv2.1."""

    def __init__(self, model, tokenizer, fit="crop"):
        super().__init__(model, image_size(model), model.visual.image_mean, model.visual.image_std)
        self.tokenizer = tokenizer
        self.fit = fit

    def features(self, pixels):
        """Prepared pixels [B, 3, size, size] -> f [B, D] float32 of norm 1, with gradient."""
        return F.normalize(self.model.encode_image(pixels).float(), dim=-1)

    def encode_text(self, texts):
        """B texts -> C [B, D] float32 of norm 1. Texts are truncated to the encoder's length, usually 77 tokens."""
        ids = moved(self.tokenizer(texts), self.device)    # [B, 77]
        return F.normalize(self.model.encode_text(ids).float(), dim=-1)

    def does_not_know(self, text):
        """Whether its tokenizer splits a word of a text into single letters or bytes, or reads a part as unknown."""
        tokenizer = getattr(self.tokenizer, "tokenizer", None)  # transformers'; OpenAI's has none inside
        for word in text.lower().split():
            pieces = self.tokenizer.encode(word) if tokenizer is None else tokenizer.tokenize(word)
            if 1 < len(word.encode()) <= len(pieces) or tokenizer is not None and tokenizer.unk_token in pieces:
                return True
        return False


def image_size(model):
    """The pixels of a side that an open_clip model takes. Its towers give it as a number or as (height, width)."""
    size = model.visual.image_size
    return size if isinstance(size, int) else size[0]


# ---------------------------------------------------------------------------------------------------- loading
def fetch(where):
    """The path of weights in one of the two layouts: `where` itself, or a hub repository's folder. Raises UserError if
    it cannot be had."""
    return fetched(where, [])


def load(path, device, arch=ARCH):
    """The `ClipReward` of weights in one of the two layouts. arch: open_clip's name of a .pt's architecture.

    Raises UserError for a folder that asks for code to be run. Files that open_clip and torch cannot read raise their
    errors.
    """
    path = file_of(path)
    if path.name == CONFIG:
        return load_folder(path.parent, device)
    state = state_of(path)
    must_be(arch, state)
    with quiet():
        model = open_clip.create_model(arch, pretrained=None)
        tokenizer = open_clip.get_tokenizer(arch)
    model.load_state_dict(state)
    return ClipReward(model.to(device), tokenizer, "letterbox")    # HPSv2's evaluator prepares pictures so


def file_of(path):
    """The file that says which layout a path has: an open_clip folder's config, or a .pt. Raises UserError if there is
    neither."""
    if path.is_file():
        return path
    for name in (CONFIG, CHECKPOINT):
        if (path / name).is_file():
            return path / name
    raise UserError(f"{path}: no reward in it, neither {CONFIG} nor {CHECKPOINT}")


def state_of(path):
    """{name: tensor} of a .pt: the content of its "state_dict", otherwise its own content. Raises UserError if these
    are not tensors."""
    found = torch.load(path, map_location="cpu", weights_only=True)
    state = found.get("state_dict", found) if isinstance(found, dict) else None
    if not isinstance(state, dict) or not state or not all(map(torch.is_tensor, state.values())):
        raise UserError("no tensors by their names, neither directly nor under state_dict")
    return must_be_floats({name.removeprefix("module."): tensor for name, tensor in state.items()})


def must_be(arch, state):
    """Raise UserError if the weights are not of the vision transformer `arch`. The message describes both sizes. Other
    architectures are checked by open_clip itself."""
    vision = open_clip.get_model_config(arch)["vision_cfg"]
    if not isinstance(vision["layers"], int):  # it is a ResNet
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
                        "need an open_clip folder, whose config gives the architecture")


def tower(width, layers, patch):
    """The size of a vision transformer in words."""
    return f"a vision tower {width} wide with {layers} layers and patches of {patch} pixels"


def load_folder(folder, device):
    """The `ClipReward` of an open_clip folder. Raises UserError for a folder that is not one, or needs foreign code."""
    text_config = network_config(folder)["text_cfg"]
    check_dtypes(folder)
    with quiet():
        model = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True)
        tokenizer = tokenizer_of(folder, text_config)
    prepared = model.visual.preprocess_cfg
    if prepared["interpolation"] != "bicubic":
        raise UserError(f"{CONFIG} asks for {prepared['interpolation']} resizing of pictures; only bicubic resizing is "
                        "supported")
    return ClipReward(model.to(device), tokenizer, FITS[prepared["resize_mode"]])


def tokenizer_of(folder, text_config):
    """The tokenizer of an open_clip folder: its own if it has one, otherwise OpenAI's. Raises UserError if it has more
    words than the text tower, or far fewer."""
    length = text_config.get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH)
    if text_config.get("hf_tokenizer_name"):
        # The tokenizer is transformers'. Without this option it asks on the terminal whether to run foreign code.
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}", trust_remote_code=False)
    elif (folder / "tokenizer.json").exists():
        options = {"trust_remote_code": False} | text_config.get("tokenizer_kwargs", {})
        tokenizer = open_clip.tokenizer.HFTokenizer(folder, length, **options)
    else:
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    if hasattr(tokenizer, "tokenizer"):
        last = max(tokenizer.tokenizer.get_vocab().values(), default=-1)
    else:
        last = tokenizer.vocab_size - 1
    words = text_config.get("vocab_size", OPENAI_WORDS)
    if not LEAST_KNOWN * words <= last + 1 <= words:
        raise UserError(f"its tokenizer has {last + 1} words, and its text tower knows {words}, as {CONFIG} "
                        "says; put the right tokenizer.json beside that file")
    return tokenizer


def network_config(folder):
    """model_cfg of an open_clip folder: a dict.

    Raises UserError if the folder is not one, or if a file in it asks for code to be run, because weights may come
    from strangers. transformers runs the code of a tokenizer if its options in open_clip's config say
    trust_remote_code. It offers to run the code of a config with auto_map. That config may be in the folder, or in a
    text model on the hub that hf_model_name names. timm fetches a network by its name.
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
    """While this lasts, open_clip's messages are not printed. open_clip logs to the root logger, and adds a handler if
    there is none. So here the root logger gets a handler that prints nothing. Afterwards it is restored."""
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
    """The `ImageNetwork` of an open_clip folder `where`, with the folder's architecture; otherwise that of `arch`."""
    if where is not None and file_of(Path(where)).name == CONFIG:
        config = network_config(Path(where))
    else:
        config = open_clip.get_model_config(arch)
    # The class is chosen as in open_clip.create_model. That function itself moves tensors, so it fails with fake ones.
    kind = open_clip.CLIP
    if config.pop("custom_text", False):
        kind = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP
    network = kind(**config).requires_grad_(False)
    return base.ImageNetwork(network, base.on_zeros(network.encode_image, image_size(network)), times=1)
