"""Eq. 9 where Eq. 10 does not hold: SRPO on a reward that is no dot product.

    python -m experiments.cross_attention

In `miniature/reward_cross` the text attends to the picture, as in ImageReward. So r1 - r2 is the difference of two
scores, and not a dot product with C1 - C2. SRPO is trained on it as on the usual reward, and Direct-Align on its plain
score.
"""

from engine.errors import frame
from experiments import pages, runs
from experiments.pages import shown
from experiments.runs import Setting

CROSS = "--reward imagereward=miniature/reward_cross"
SETTINGS = [Setting("SRPO, dot product", ""),
            Setting("SRPO, cross-attention", CROSS),
            Setting("plain, cross-attention", f"--recipe direct-align {CROSS}")]
COLUMNS = {"realism": ("realism", ".1%"), "realism_2": ("realism, second judge", ".1%"),
           "alignment": ("alignment", ".1%"), "broken": ("broken", ".1%"), "frechet": ("Frechet", ".1f"),
           "redness": ("redness", "+.3f"), "texture": ("texture", ".4f"), "saturation": ("saturation", ".3f"),
           "sgp": ("SGP of the usual reward", "+.3f")}


def main(argv=None):
    with frame("cross_attention"):
        own = runs.parse(runs.parser(__doc__, seeds=3), argv)
        rows = runs.measured(own, SETTINGS, "cross_attention")
        dot, ours, plain = (rows[setting.name] for setting in SETTINGS)
        result = pages.verdict(
            ours["realism"].mean >= 0.85 and ours["broken"].mean < runs.BROKEN,
            f"with cross-attention SRPO's realism is {shown(ours['realism'], '.1%')}, with a dot product "
            f"{shown(dot['realism'], '.1%')}; its alignment is {shown(ours['alignment'], '.1%')} and "
            f"{shown(dot['alignment'], '.1%')}, the Frechet distance {shown(ours['frechet'], '.1f')} and "
            f"{shown(dot['frechet'], '.1f')}, saturation {shown(ours['saturation'], '.3f')} and "
            f"{shown(dot['saturation'], '.3f')}. The plain score of the same reward gives a realism of "
            f"{shown(plain['realism'], '.1%')} and an alignment of {shown(plain['alignment'], '.1%')}.")
        told = f"{pages.counted(rows)} {pages.ERROR} True photos through the VAE have a texture of 0.0049."
        claim = "SRPO needs two scores of a picture, and no dot product (Eq. 9)."
        page = pages.Page("A reward that is no dot product (Eq. 9)", claim, result, told, [(rows, COLUMNS)])
        pages.write(own, "cross_attention", page, pages.bar_figure(rows, ("realism", "alignment", "broken", "frechet")))


if __name__ == "__main__":
    main()
