"""CLIP ViT-H/14 of LAION: the cosine of picture and text. It was not trained on people's preferences."""

from engine.hub import fetched
from rewards import clip_model
from rewards.base import Column

COLUMNS = {"clip": Column("CLIP", ".4f")}

REPOSITORY = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
TOKENIZER = ["tokenizer*", "vocab.json", "merges.txt", "special_tokens*"]


def fetch(where=None):
    """The path of an open_clip folder with its tokenizer. Raises UserError if it cannot be had."""
    return fetched(where or REPOSITORY, ["open_clip*", *TOKENIZER])


load = clip_model.load
image_network = clip_model.image_network
