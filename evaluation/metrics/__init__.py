"""Every metric by its name: rewards as metrics, scorers that are not rewards and that nothing is trained on
(imagereward.py, geneval.py, deqa.py), plain pixel statistics, the miniature's judge.

A scorer is made from files, which `fetch` finds (a local path or the hub), and is called with B PIL pictures
(RGB, any size) and their B prompts (GenEval: their lines of its metadata); it gives a dict
{column: [B] float32}.
"""

from pathlib import Path

import torch
import torch.nn.functional as F

import srpo_reward as sr
from rewards.pictures import pixels

from . import deqa, geneval, imagereward

STATISTICS = ("saturation", "redness", "brightness", "texture")


def pixel_statistics(images):
    """Plain numbers of B pictures [B, 3, H, W] in [0, 1]: a dict of [B] tensors.

    saturation  mean HSV saturation, [0, 1]
    redness     mean of R - (G + B) / 2, [-1, 1]: the cast that a reward biased towards red buys
    brightness  mean luma (Rec. 601), [0, 1]
    texture     mean distance of the luma from its 3 x 3 mean, [0, 1]: grain and detail raise it,
                smoothing lowers it
    """
    high, low = images.max(1).values, images.min(1).values
    r, g, b = images.unbind(1)
    luma = 0.299 * r + 0.587 * g + 0.114 * b
    smooth = F.avg_pool2d(F.pad(luma[:, None], (1, 1, 1, 1), mode="replicate"), 3, stride=1)[:, 0]
    return {"saturation": ((high - low) / high.clamp(min=1e-6)).mean((1, 2)),
            "redness": (r - (g + b) / 2).mean((1, 2)),
            "brightness": luma.mean((1, 2)),
            "texture": (luma - smooth).abs().mean((1, 2))}


def load_judge(model):
    """The judge that lies in a model's folder, or None."""
    if not (Path(model) / "judge").is_dir():
        return None
    from miniature.judge import load_judge
    return load_judge(model)


@torch.no_grad()
def measure(images, prompts, rewards, judge, control, neg, batch=64):
    """While training: every score of P pictures [P, 3, H, W] in [0, 1] for their P prompts, a dict of [P]
    float tensors.

    reward  Eq. 7, f.C0 of the bare prompt;  sgp  Eq. 10, f.(C1 - C2): of the `Rewards` as they are trained on
    and, where there are several or one is held out, of each one;  the pixel statistics;  the judge's
    verdicts.
    """
    parts = []
    for i in range(0, len(images), batch):
        x, texts, scores, each = images[i:i + batch], prompts[i:i + batch], {"reward": 0, "sgp": 0}, {}
        for label, (reward, weight) in rewards.parts.items():
            f = reward.image_features(x.to(reward.device))
            C0, C1, C2 = reward.conditions(texts, control, neg)
            for k, r in (("reward", sr.preference(f, C0)), ("sgp", sr.relative(f, C1, C2))):
                scores[k], each[f"{k} {label}"] = scores[k] + weight * r, r
        scores |= {**(each if len(rewards.parts) > 1 else {}), **pixel_statistics(x)}
        if judge is not None:
            scores |= judge.verdicts(x, texts)
        parts.append({k: v.float().cpu() for k, v in scores.items()})
    return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}


# --------------------------------------------------------------------------------- the metrics of evaluate.py
class RewardScorer:
    """A reward as a metric: r of the bare prompt (Eq. 7) in the metric's own unit; where there is a second
    column, the SGP gap f.(C1 - C2) (Eq. 10); with a third, that gap on the authors' display scale."""

    def __init__(self, reward, columns, flags):
        self.reward, self.columns, self.control, self.neg = reward, columns, flags.control, flags.neg

    @torch.no_grad()
    def __call__(self, pictures, prompts):
        f = self.reward.picture_features(pictures)
        C0, C1, C2 = self.reward.conditions(prompts, self.control, self.neg)
        gap = sr.relative(f, C1, C2)
        return dict(zip(self.columns, (self.reward.unit * sr.preference(f, C0), gap, 100 * (gap + 0.01))))


def statistics(pictures, prompts):
    """`pixel_statistics` of pictures of any sizes, as a scorer."""
    each = [pixel_statistics(pixels(p)[None]) for p in pictures]
    return {k: torch.cat([e[k] for e in each]) for k in STATISTICS}


def fetch_rewards(spec):
    """{"spec": a specification of rewards, label: the path of its weights}; ValueError, one line, if one
    cannot be had."""
    return {"spec": spec, **{label: sr.fetch(name, where)
                             for label, (name, where, _) in sr.parse_rewards(spec).items()}}


def fetch_judge(where):
    """The folder that holds judge/; ValueError, one line, if there is none."""
    if not (Path(where) / "judge").is_dir():
        raise ValueError(f"judge: there is none in {where}; only the miniature has one")
    return Path(where) / "judge"


def judged(judge):
    """The miniature's judge as a scorer; ValueError, one line, for a picture that is not 64 x 64."""
    def scorer(pictures, prompts):
        for p in pictures:
            if p.size != (64, 64):
                raise ValueError(f"judge: it sees 64 x 64 pixels, not {p.width} x {p.height}")
        return judge.verdicts(torch.stack([pixels(p) for p in pictures]), prompts)
    return scorer


def of_reward(name, columns):
    """The entry of METRICS for a name of srpo_reward.HUB."""
    return (columns, lambda where, flags: sr.fetch(name, where),
            lambda path, flags, device: RewardScorer(sr.load_reward(name, device, path), columns, flags))


def of_scorer(room, kind):
    """The entry of METRICS for a scorer's file."""
    return (room.COLUMNS, lambda where, flags: room.fetch(where),
            lambda files, flags, device: kind(files, device))


# name: (columns, fetch(where or None, flags) -> files, load(files, flags, device) -> scorer)
METRICS = {
    "aesthetic": of_reward("aesthetic", ("aesthetic",)),
    "pickscore": of_reward("pickscore", ("pickscore",)),
    "imagereward": of_scorer(imagereward, imagereward.ImageReward),
    "hpsv2.1": of_reward("hpsv2.1", ("hps", "sgp_hps", "sgp_hps_shown")),
    "geneval": of_scorer(geneval, geneval.GenEval),
    "deqa": of_scorer(deqa, deqa.DeQA),
    "clip": of_reward("clip", ("clip",)),
    "reward": (("reward", "sgp"), lambda where, flags: fetch_rewards(where or flags.reward),
               lambda files, flags, device: RewardScorer(sr.load_rewards(files["spec"], device),
                                                         ("reward", "sgp"), flags)),
    "statistics": (STATISTICS, lambda where, flags: None, lambda files, flags, device: statistics),
    "judge": (("realism", "alignment", "broken"), lambda where, flags: fetch_judge(where or flags.model),
              lambda folder, flags, device: judged(load_judge(folder.parent)))}


def parse_metrics(spec):
    """"hpsv2.1,pickscore=PATH" -> {name: where or None}. Raises ValueError, one line, for what is no
    metric."""
    chosen = {}
    for item in spec.split(","):
        name, _, where = item.strip().partition("=")
        if name not in METRICS:
            raise ValueError(f"--metrics {item.strip()}: not a metric; there are {', '.join(METRICS)}")
        chosen[name] = where or None
    return chosen
