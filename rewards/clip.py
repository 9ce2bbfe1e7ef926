"""CLIP ViT-H/14 of LAION: a plain cosine of picture and text, with no preference learned."""

from engine.hub import fetched
from rewards import clip_model
from rewards.base import Column

COLUMNS = {"clip": Column("CLIP", ".4f")}

REPOSITORY = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
TOKENIZER = ["tokenizer*", "vocab.json", "merges.txt", "special_tokens*"]


def fetch(where=None):
    """The path of an open_clip folder, its tokenizer included."""
    return fetched(where or REPOSITORY, ["open_clip*", *TOKENIZER])


load = clip_model.load
image_network = clip_model.image_network
