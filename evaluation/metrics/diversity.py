"""Diversity: how different the pictures are that a model makes of one prompt, from several noise seeds.

--per-prompt pictures of each of PROMPTS prompts. The first one is the benchmark's; the others lie in diversity/ of a
row's folder.
"""

import torch
import torch.nn.functional as F

import rewards
from engine.errors import UserError
from evaluation.metrics import reward
from evaluation.picture_folders import Picture
from rewards.base import Column

COLUMNS = {"diversity": Column("diversity", ".4f")}
SEEDS_APART = 10**6  # between the pictures of a prompt; larger than any benchmark, so that no noise is used twice
PROMPTS = 64         # most prompts; of a longer benchmark, every k-th


def pictures(files, args, benchmark):
    """The `Picture`s of PROMPTS prompts, --per-prompt of each. Of a benchmark of P prompts it takes every k-th, k the
    whole part of P / PROMPTS."""
    found = []
    for one in benchmark[::max(1, len(benchmark) // PROMPTS)][:PROMPTS]:
        found.append(one)
        for k in range(1, args.per_prompt):
            found.append(Picture(f"diversity/{one.name}_{k}", one.prompt, one.seed + k * SEEDS_APART,
                                 one.category))
    return found


WHERE = reward.WHERE
fetch = reward.fetch  # the network whose image features are compared is the reward's


def check(args):
    """Raises UserError if --per-prompt is 1."""
    if args.per_prompt < 2:
        raise UserError(f"--per-prompt {args.per_prompt}: diversity compares pictures of one prompt; give 2 or more")


def load(files, args, device):
    """Raises UserError for a reward without features of a picture alone."""
    parts = rewards.load_rewards(files.spec, device).trained
    if not all(reward.is_dot_product for reward, _ in parts):
        raise UserError(f"--metrics diversity={files.spec}: it compares image features, and here they need a text; "
                        "give a reward such as hpsv2.1")
    return Scorer(parts)


class Scorer:
    """Scores a picture by the mean of 1 - cosine between its image features and those of its prompt's other ones."""

    def __init__(self, parts):
        """parts: a list of (reward, weight)."""
        self.parts = parts

    @torch.no_grad()
    def __call__(self, images, prompts):
        """B PIL pictures and their B prompts -> {column: [B]}. All pictures of a prompt must be in one call. NaN for a
        picture without another one of its prompt."""
        f = torch.cat([weight * reward.picture_features(images) for reward, weight in self.parts], -1)  # [B, D]
        f = F.normalize(f, dim=-1)
        apart = 1 - f @ f.T  # [B, B]
        same = torch.tensor([[a == b for b in prompts] for a in prompts]).to(apart.device)
        others = same & ~torch.eye(len(f), dtype=torch.bool, device=apart.device)
        return {"diversity": (apart * others).sum(1) / others.sum(1)}
