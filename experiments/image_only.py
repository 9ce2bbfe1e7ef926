"""S1: a reward that reads no text. Direct-Align on it alone, and relative to its own noised picture.

    python -m experiments.image_only

The reward only likes saturated colours. The paper's relative form for such a reward is r(x) - r(x + noise), of a clean
picture and the same picture with a little noise. It says that this hacks less. So both are compared when the reward
has risen equally far: as far as every run gets.
"""

import torch

import recipe
import srpo_reward as sr
import train
from engine.errors import frame
from experiments import pages, runs
from experiments.pages import shown
from experiments.runs import Setting

NOISE = 0.1  # standard deviation of the noise, of pixels in [0, 1] [ours]: the paper says "small amounts"
REWARD = "miniature/reward_saturation"
ALIGN = "--form plain --branches denoise --injections 2 --lam 1 0.4 --threshold off --steps 52"
ROWS = [Setting("the reward alone", f"--reward {REWARD} {ALIGN}"),
        Setting("relative to its noised picture", f"--reward {REWARD} --method noised {ALIGN}")]
AT_EQUAL = ("alignment", "broken", "saturation", "redness", "brightness", "frechet")
COLUMNS = {"at_update": ("equally far at update", ".1f"), "alignment_at": ("alignment there", ".1%"),
           "broken_at": ("broken there", ".1%"), "saturation_at": ("saturation there", ".3f"),
           "redness_at": ("redness there", "+.3f"), "brightness_at": ("brightness there", ".3f"),
           "frechet_at": ("Frechet there", ".1f"), "reward": ("reward at the end", ".3f"),
           "alignment": ("alignment at the end", ".1%"), "broken": ("broken at the end", ".1%")}


class Noised(sr.Rewards):
    """A reward relative to its own noised picture: f(x) - f(x + noise) in place of f(x), so that every dot product with
    it is a difference of two rewards (S1)."""

    def __init__(self, reward, seed):
        super().__init__(reward.parts)
        self.draw = torch.Generator().manual_seed(seed)

    def see(self, images):
        """As in `srpo_reward.Rewards`, for images [B, 3, H, W] in [0, 1]."""
        noise = NOISE * torch.randn(images.shape, generator=self.draw).to(images)
        noised = (images + noise).clamp(0, 1)
        both = zip(super().see(images), super().see(noised), strict=True)
        return [(part, weight, f - of_noised) for (part, weight, f), (_, _, of_noised) in both]


def noised(a, net, reward, batch):
    """SRPO's loss terms, with `Noised` in place of the reward."""
    yield from train.srpo(a, net, Noised(reward, batch.step), batch)


recipe.METHODS["noised"] = recipe.Method(noised, "S1", recipe.srpo_calls)


def main(argv=None):
    with frame("image_only"):
        own = runs.parse(runs.parser(__doc__, seeds=3), argv)
        logs = {setting.name: [runs.watched(own, setting.flags, seed) for seed in range(own.seeds)] for setting in ROWS}
        each = [log for of_row in logs.values() for log in of_row]
        height = min(max(line["watch"]["reward"] for line in log if "watch" in line) for log in each)
        rows = {}
        for name, of_row in logs.items():
            numbers = []
            for log in of_row:
                row = {f"{column}_at": runs.at_equal(log, column, "reward", height) for column in AT_EQUAL}
                row["at_update"] = runs.first_step(log, "reward", lambda value: value >= height)
                numbers.append(row | {column: log[-1]["watch"][column] for column in ("reward", "alignment", "broken")})
            rows[name] = pages.over_seeds(numbers)
        alone, ours = rows.values()
        result = pages.verdict(
            ours["frechet_at"].mean < alone["frechet_at"].mean and ours["broken_at"].mean <= alone["broken_at"].mean,
            f"at equal reward alignment is {shown(ours['alignment_at'], '.1%')} relative, "
            f"{shown(alone['alignment_at'], '.1%')} alone; the Frechet distance is {shown(ours['frechet_at'], '.1f')} "
            f"and {shown(alone['frechet_at'], '.1f')}. It is reached at update {shown(ours['at_update'], '.1f')} and "
            f"{shown(alone['at_update'], '.1f')}. After 52 updates {shown(ours['broken'], '.1%')} and "
            f"{shown(alone['broken'], '.1%')} are broken: in equal updates it hacks less, as the reward rises less.")
        told = (f"{runs.n_watched(own)} watched pictures, {own.seeds} seeds. {pages.ERROR_OF_SEEDS} Equally far is a "
                f"reward of {height:.3f}. The noise has a standard deviation of {NOISE:g}.")
        claim = "A reward that reads no text hacks less if it is relative to its own noised picture (S1)."
        page = pages.Page("A reward that reads no text (S1)", claim, result, told, [(rows, COLUMNS)])
        figure = pages.curve_figure({name: of_row[0] for name, of_row in logs.items()},
                                    ("saturation", "alignment", "broken", "frechet"),
                                    f"{runs.n_watched(own)} watched pictures every 2 updates, seed 0")
        pages.write(own, "image_only", page, figure)


if __name__ == "__main__":
    main()
