"""Common GPUs, from their data sheets."""

from typing import NamedTuple

from engine.errors import UserError

# Dense bf16 TFLOP/s. H200 comes before H20, since "H20" is found in its name too.
PEAK = {"H200": 989, "H100": 989, "A100": 312, "H20": 148, "L40S": 362, "RTX 4090": 165, "RTX 4080": 97,
        "RTX 4070": 58}

WITHOUT_FLOAT8 = ("A100",)  # of these: products in float8 begin with Ada and Hopper


class Card(NamedTuple):
    """A common GPU."""
    name: str
    gib: float    # memory as torch reports it
    peak: float   # dense bf16 TFLOP/s


CARDS = (Card("RTX 4070, 12 GB", 11.6, PEAK["RTX 4070"]), Card("RTX 4080, 16 GB", 15.7, PEAK["RTX 4080"]),
         Card("RTX 4090, 24 GB", 23.6, PEAK["RTX 4090"]), Card("L40S, 48 GB", 44.4, PEAK["L40S"]),
         Card("H100, 80 GB", 79.1, PEAK["H100"]), Card("H200, 141 GB", 139.8, PEAK["H200"]))


def gib(card):
    """The memory of a card of PEAK, GiB as torch reports it; the larger one if there are two."""
    others = {"A100": 79.1, "H20": 95.1}
    return others.get(card) or next(known.gib for known in CARDS if known.name.startswith(card))


def check(card):
    """Raise UserError for a card that is not in PEAK."""
    if card not in PEAK:
        raise UserError(f"--card {card}: its peak is not known here; known are {', '.join(PEAK)}")
