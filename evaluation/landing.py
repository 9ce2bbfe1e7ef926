"""When a run should end (--land): when its watched pictures have the SGP gap that photographs have.

The relative reward has no largest value. A run that goes on for long scores more than every photograph, and its
pictures break. But photographs have a finite SGP gap r1 - r2, which can be measured. The watched pictures are sampled
like any other sample, so their gap can be compared with it. The gap of the pictures that are trained on cannot: they
have fewer steps and less guidance. It begins above that of samples, and ends below it.

The run ends ("lands") when the watched gap less its standard error reaches the level. Before that, each look at the
watched pictures sets the learning rate (`watch.slower`), so that the next look is near the level. Without this, a run
with a large learning rate, or with few looks, would go far beyond the level.
"""

import torch

from engine.data import photographs
from engine.errors import UserError
from evaluation.watch import measure

MOST = 256  # photographs that are scored, evenly spread over the folder
ENOUGH = 16  # photographs; with fewer, a line says that the level is unsure


def references(a, model, world):
    """The `Photograph`s of --land, MOST of them at most; none without a folder. Raises UserError, also for one alone,
    whose gap has no standard error."""
    if not isinstance(a.land, str):
        return []
    found = photographs.read(a.land, a.size, model.unit, world, "--land")
    if len(found) < 2:
        raise UserError(f"--land {a.land}: one photograph has no standard error; give 2 or more, better {ENOUGH}")
    n = min(MOST, len(found))
    return [found[i * len(found) // n] for i in range(n)]


@torch.no_grad()
def level(a, model, shown, net, rewards, world):
    """The SGP gap at which a run ends; None without --land.

    a: the flags; model: a `Model`; shown: the `Photograph`s; net: a `flow.Flow`; rewards: `srpo_reward.Rewards`.
    Photographs go through the VAE first, as the model's own pictures do. The processes share the work."""
    if not shown:
        return a.land
    mine = []
    for photograph in shown[world.rank::world.size]:
        x = net.encode(photographs.pixels(photograph, model.unit))
        scores = measure(net.decode(x, photograph.grid), [photograph.caption], rewards, None, a.control[0], a.neg[0])
        mine.append(scores["sgp"])
    gaps = torch.cat([gap for theirs in world.gather(mine) for gap in theirs])
    found = gaps.mean().item()
    error = gaps.std().item() / len(gaps) ** 0.5
    few = f"; {ENOUGH} photographs or more would make it surer" if len(gaps) < ENOUGH else ""
    world.say(f"--land {a.land}: {len(gaps)} photographs have a mean SGP gap of {found:+.3f} ± {error:.3f} (standard "
              f"error); the run ends when the watched pictures reach it{few}")
    return found
