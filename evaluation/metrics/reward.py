"""Rewards as metrics: those of rewards/ by their names, and `reward`, which is train.py's --reward."""

from typing import NamedTuple

import torch

import rewards
import srpo_reward as sr
from rewards.base import Column

COLUMNS = {"reward": Column("reward", "+.3f"), "sgp": Column("sgp", "+.3f")}


class Files(NamedTuple):
    """What --reward says, and the path of each part's weights."""
    spec: str
    weights: tuple


WHERE = "reward"


def fetch(where=None):
    """The `Files` of a specification of rewards, `where`. Raises UserError."""
    return Files(where, tuple(rewards.fetch(part.name, part.where) for part in rewards.parse_rewards(where)))


def load(files, args, device):
    """Raises UserError."""
    return RewardScorer(rewards.load_rewards(files.spec, device), COLUMNS, args)


class RewardMetric:
    """A reward of rewards/ as a metric of its name."""

    def __init__(self, name):
        self.name = name
        self.COLUMNS = rewards.module(name).COLUMNS

    def fetch(self, where=None):
        """The path of its weights. Raises UserError."""
        return rewards.fetch(self.name, where)

    def load(self, path, args, device):
        """Raises UserError."""
        return RewardScorer(rewards.load_reward(self.name, device, path), self.COLUMNS, args)


class RewardScorer:
    """A reward as a scorer. Its first column is r of the bare prompt (Eq. 7) in the metric's own unit; the
    second, if there is one, the SGP gap f.(C1 - C2) of --control and --neg (Eq. 10); the third that gap as
    the paper's authors display it [their answer to a question about Table 1]."""

    def __init__(self, reward, columns, args):
        self.reward = reward
        self.columns = columns
        self.control = args.control
        self.neg = args.neg

    @torch.no_grad()
    def __call__(self, pictures, prompts):
        """B PIL pictures and B prompts -> {column: [B]}."""
        f = self.reward.picture_features(pictures)
        C0, C1, C2 = self.reward.conditions(prompts, self.control, self.neg)
        gap = sr.relative(f, C1, C2)
        values = [self.reward.unit * sr.preference(f, C0), gap, 100 * (gap + 0.01)]
        return dict(zip(self.columns, values, strict=False))
