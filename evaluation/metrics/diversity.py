"""Diversity: how far apart the pictures are that a model makes of one prompt, from several noise seeds.

They lie in diversity/ of a row's folder, --per-prompt of each of the first prompts.
"""

import torch
import torch.nn.functional as F

import rewards
from engine.errors import UserError
from evaluation.metrics import reward
from evaluation.picture_folders import Picture
from rewards.base import Column

COLUMNS = {"diversity": Column("diversity", ".4f")}
SEEDS_APART = 10**6  # the k-th picture of a prompt has its own noise, another than any first picture's
PROMPTS = 64         # as many of the benchmark's prompts, from the first of each category on


def pictures(files, args, benchmark):
    """The `Picture`s of the first PROMPTS of the benchmark's prompts, --per-prompt of each."""
    found = []
    for one in benchmark[::max(1, len(benchmark) // PROMPTS)][:PROMPTS]:
        for k in range(args.per_prompt):
            found.append(Picture(f"diversity/{one.name}_{k}", one.prompt, one.seed + k * SEEDS_APART,
                                 one.category))
    return found


WHERE = reward.WHERE
fetch = reward.fetch  # of the network whose image features are compared


def check(args):
    """Raises UserError for one picture a prompt."""
    if args.per_prompt < 2:
        raise UserError(f"--per-prompt {args.per_prompt}: one picture is as far from itself as it can be; "
                        "give 2 or more")


def load(files, args, device):
    return Scorer(rewards.load_rewards(files.spec, device))


class Scorer:
    """Mean 1 - cosine of the image features of a picture and of every other one of its prompt."""

    def __init__(self, network):
        self.network = network

    @torch.no_grad()
    def __call__(self, images, prompts):
        """B PIL pictures, all of each of their prompts, and B prompts -> {column: [B]}. NaN for a picture
        that is alone."""
        f = F.normalize(self.network.picture_features(images), dim=-1)  # [B, D]
        apart = 1 - f @ f.T                                             # [B, B]
        same = torch.tensor([[a == b for b in prompts] for a in prompts]).to(apart.device)
        others = same & ~torch.eye(len(f), dtype=torch.bool, device=apart.device)
        return {"diversity": (apart * others).sum(1) / others.sum(1)}
