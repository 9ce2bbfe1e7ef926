"""How many updates, and how far is the cliff? Five learning rates, up to three times the recipe's updates.

    python -m experiments.margin --model miniature

Everything is measured on the selection prompts (--watch-prompts), none of which is evaluated. The rule, for
each learning rate: the updates are the first multiple of 6 at which GOAL of the pictures are photos, and the
rate is safe if at most BROKEN of them are broken until half as many updates more. Of the safe rates that one
is chosen whose pictures are then nearest to true photos (the Frechet distance).
"""

import sys
from typing import NamedTuple

import prepare
import train
from engine import parallel
from engine.command_line import Parser, real, whole
from engine.errors import UserError, frame
from experiments import bench

EVERY = 6  # updates between two looks
GOAL = 0.85  # realism
BROKEN = 0.02


class Look(NamedTuple):
    """What the selection prompts' pictures were after some updates."""
    updates: int
    realism: float
    alignment: float
    broken: float
    frechet: float


def flags(argv):
    """This script's own flags, and those of train.py. Raises UserError."""
    parser = Parser(__doc__)
    parser.add_argument("--lrs", type=real(0, 1e3, open_low=True), nargs="+",
                        default=[6e-6, 1.2e-5, 2.5e-5, 5e-5, 1e-4], help="learning rates")
    parser.add_argument("--updates", type=whole(EVERY), default=72, help="of each")
    parser.add_argument("--pictures", type=whole(24), default=128, help="that are looked at each time")
    return parser.parse_known_args(argv)


def looks(lr, own, others, world):
    """The [`Look`] of a run with one learning rate: before it, and after every EVERY updates. Raises
    UserError for a model that has no judge."""
    a = train.flags([*others, "--lr", str(lr), "--watch", str(own.pictures), "--steps", str(own.updates),
                     "--eval", "0"])
    prepare.settle(a, world)
    run = prepare.set_up(a, world)
    watch = run.watched
    if watch.judge is None:
        raise UserError(f"--model {a.model}: it has no judge, and nothing else knows what a photo is")
    found = []
    for step in range(own.updates + 1):
        if step > 0:
            bench.one_update(a, run, [], step)
        if step % EVERY == 0:
            images, scores = watch.look(watch.watched, f"lr {lr:g}, update {step}")
            told = watch.summary(images, scores, watch.watched)
            means = [told[name]["mean"] for name in ("realism", "alignment", "broken", "frechet")]
            found.append(Look(step, *means))
            print(row(lr, found[-1]), flush=True)
    return found


def row(lr, look):
    """A line of the table."""
    return (f"| {lr:g} | {look.updates} | {look.realism:.1%} | {look.alignment:.1%} | {look.broken:.1%} | "
            f"{look.frechet:.1f} |")


def arrival(found):
    """The first `Look` at which GOAL of the pictures are photos, if until half as many updates more at most
    BROKEN of them are broken; else None."""
    arrived = next((look for look in found if look.realism >= GOAL), None)
    if arrived is None or found[-1].updates < 1.5 * arrived.updates:
        return None
    until = [look for look in found if look.updates <= 1.5 * arrived.updates]
    return arrived if all(look.broken <= BROKEN for look in until) else None


def main():
    with frame("margin"):
        own, others = flags(sys.argv[1:])
        world = parallel.World()
        print("| lr | updates | realism | alignment | broken | Frechet |\n|---|---|---|---|---|---|")
        arrivals = {}
        for lr in own.lrs:
            arrived = arrival(looks(lr, own, others, world))
            if arrived is not None:
                arrivals[lr] = arrived
        if arrivals:
            lr = min(arrivals, key=lambda lr: arrivals[lr].frechet)
            print(f"\n--lr {lr:g} --steps {arrivals[lr].updates}")
        else:
            print(f"\nnone of these learning rates reaches a realism of {GOAL:.0%} safely")


if __name__ == "__main__":
    main()
