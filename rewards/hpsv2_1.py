"""HPSv2.1 (github.com/tgxs002/HPSv2), the paper's reward: CLIP ViT-H/14 fine-tuned on people's choices."""

from engine.hub import fetched
from rewards import clip_model
from rewards.base import Column

COLUMNS = {"hps": Column("HPS", ".4f"),
           "sgp_hps": Column("SGP-HPS, raw", "+.4f"),
           "sgp_hps_shown": Column("SGP-HPS, authors' scale", ".3f")}


def fetch(where=None):
    """The path of HPSv2.1's .pt, of a folder with it, or of an open_clip folder. Raises UserError if it cannot be
    had."""
    return fetched(where or "xswu/HPSv2", [clip_model.CHECKPOINT])


load = clip_model.load
image_network = clip_model.image_network
