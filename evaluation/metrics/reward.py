"""Rewards as metrics: each reward of rewards/ under its name, and `reward`, which is the --reward of training."""

from typing import NamedTuple

import torch

import rewards
import srpo_reward as sr
from rewards.base import Column

COLUMNS = {"reward": Column("reward", "+.3f"), "sgp": Column("sgp", "+.3f")}


class Files(NamedTuple):
    """The text of --reward, and the path of each part's weights."""
    spec: str
    weights: tuple


WHERE = "reward"


def fetch(where=None):
    """The `Files` of `where`, the text of --reward. Raises UserError if it is wrong, or if weights cannot be had."""
    return Files(where, tuple(rewards.fetch(part.name, part.where) for part in rewards.parse_rewards(where)))


def load(files, args, device):
    """The `RewardScorer` of `Files`. Raises UserError if the weights do not fit."""
    return RewardScorer(rewards.load_rewards(files.spec, device), COLUMNS, args)


class RewardMetric:
    """A reward of rewards/ as the metric of the same name."""

    def __init__(self, name):
        self.name = name
        self.COLUMNS = rewards.module(name).COLUMNS

    def fetch(self, where=None):
        """The path of its weights, downloaded if they are not here. Raises UserError if they cannot be had."""
        return rewards.fetch(self.name, where)

    def load(self, path, args, device):
        """The `RewardScorer` of a path that fetch returned. Raises UserError if the weights do not fit."""
        return RewardScorer(rewards.load_fetched(self.name, path, device), self.COLUMNS, args)


class RewardScorer:
    """A reward as a scorer with one to three columns.

    The first is r of the bare prompt (Eq. 7) in the metric's own unit. The second is the SGP gap r1 - r2 (Eq. 9), the
    reward's difference between the prompts with --control and with --neg. The third is that gap as the paper's
    authors display it [their answer to a question about Table 1].
    """

    def __init__(self, reward, columns, args):
        self.reward = reward
        self.columns = columns
        self.control = args.control
        self.neg = args.neg

    @torch.no_grad()
    def __call__(self, pictures, prompts):
        """B PIL pictures and B prompts -> {column: [B]}."""
        r0, r1, r2 = self.reward.of_pictures(pictures, sr.texts_of(prompts, self.control, self.neg))
        values = [self.reward.unit * r0.value()]
        if len(self.columns) > 1:    # otherwise the two texts need not be scored
            gap = sr.relative(r1, r2).value()
            values += [gap, 100 * (gap + 0.01)]
        return dict(zip(self.columns, values, strict=False))
