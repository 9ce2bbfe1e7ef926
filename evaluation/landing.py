"""Where a run should end (--land): where its watched pictures score the SGP gap that photographs score.

The relative reward has no end of its own. A run that goes on passes every photograph, and its pictures break. But
photographs score a finite SGP gap r1 - r2, which can be measured. The watched pictures are sampled as samples are,
so their gap can be compared with it. The gap of training's pictures cannot: they have fewer steps and less guidance.
It begins above that of samples, and ends below it.

The run has arrived when the watched gap less its standard error has. Before that, each look sets the learning rate
(`watch.slower`), so that the next one does not find the pictures far beyond. Without this, a learning rate of four
times the usual one, or seldom looks, would pass the level by as much as a look's whole change.
"""

import torch

from engine.data import photographs
from evaluation.watch import measure

MOST = 256  # photographs that are scored, evenly spread over the folder


def references(a, model, world):
    """The `Photograph`s of --land, MOST of them at most; none without a folder. Raises UserError."""
    if not isinstance(a.land, str):
        return []
    found = photographs.read(a.land, a.size, model.unit, world, "--land")
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
    world.say(f"--land {a.land}: {len(gaps)} photographs have an SGP gap of {found:+.3f} on average, with a standard "
              f"deviation of {gaps.std(correction=0).item():.3f}; the run ends when the watched pictures reach it")
    return found
