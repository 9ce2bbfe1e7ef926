"""How long until the pictures are photos? Recipes train the miniature until a share of the pictures are photos.

    python -m experiments.race --model miniature

Only updates are timed. After each update, held-out prompts are sampled and judged; this time does not count. The
released recipe is also timed with the habits of the released code's loop. They change its seconds, not its pictures.
"""

import sys
from statistics import median
from typing import NamedTuple

import command
import prepare
from engine.command_line import Parser, real, whole
from engine.errors import UserError, frame
from engine.memory import parallel, work
from experiments import bench

LIMIT = 60  # most updates of a recipe


class Lap(NamedTuple):
    """The result of a recipe."""
    updates: int  # until the goal was reached
    each: float   # seconds of an update, the median
    total: float  # seconds of all updates
    flop: int     # of an update


def flags(argv):
    """(this script's own flags, the others, which go to train.py for every recipe). Raises UserError."""
    parser = Parser(__doc__)
    parser.add_argument("--goal", type=real(0, 1), default=0.9,
                        help="share of pictures that the judge calls photos")
    parser.add_argument("--pictures", type=whole(8), default=128, help="held-out pictures that are judged")
    return parser.parse_known_args(argv)


def race(name, others, own, world):
    """Train with a recipe until the goal is reached. Returns its `Lap`. Raises UserError for a model without a judge,
    and if LIMIT updates do not reach the goal."""
    a, model = command.read([*others, "--recipe", name, "--watch", str(own.pictures)])
    a.steps = LIMIT
    prepare.settle(a, model, world)
    run = prepare.set_up(a, model, world)
    if run.watched.judge is None:
        raise UserError(f"--model {a.model}: it has no judge, which is needed to count photos; give the miniature")
    seconds = []
    for step in range(1, LIMIT + 1):
        phases = bench.one_update(a, run, [], step)
        seconds.append(sum(phases.values()))
        _, scores = run.watched.look(run.watched.watched, f"{name}, update {step}")
        if scores["realism"].mean() >= own.goal:
            break
    else:
        raise UserError(f"--recipe {name}: {LIMIT} updates did not reach a realism of {own.goal:.0%}; "
                        "give a lower --goal")
    return Lap(len(seconds), median(seconds), sum(seconds), work.update_flop(run.job))


def with_habits(others, world, repeats=3):
    """The median seconds of an update of the released recipe with the released loop's habits."""
    a, model = command.read([*others, "--recipe", "released"])
    prepare.settle(a, model, world)
    run = prepare.set_up(a, model, world)
    times = [sum(bench.one_update(a, run, bench.HABITS).values()) for _ in range(repeats)]
    return median(times)


def main():
    with frame("race"):
        own, others = flags(sys.argv[1:])
        world = parallel.World()
        laps = {name: race(name, others, own, world) for name in ("fast", "released")}
        slow = with_habits(others, world)
        released = laps["released"]
        laps["released, with the released loop's habits"] = released._replace(each=slow,
                                                                              total=slow * released.updates)
        print(f"\nto a realism of {own.goal:.0%} on {own.pictures} held-out pictures, one CPU thread\n")
        print(f"{'recipe':46}{'updates':>8}{'s each':>9}{'s in all':>10}{'ratio':>7}{'GFLOP each':>12}")
        for name, lap in laps.items():
            ratio = lap.total / laps["fast"].total
            print(f"{name:46}{lap.updates:>8}{lap.each:>9.3f}{lap.total:>10.2f}{ratio:>7.2f}"
                  f"{lap.flop / 1e9:>12.2f}")


if __name__ == "__main__":
    main()
