"""GPUs that many have, from their data sheets."""

from typing import NamedTuple

from engine.errors import UserError

# Dense bf16 TFLOP/s. H200 stands before H20, which is a part of its name.
PEAK = {"H200": 989, "H100": 989, "A100": 312, "H20": 148, "L40S": 362, "RTX 4090": 165}


class Card(NamedTuple):
    """A GPU that many have."""
    name: str
    gib: float    # as torch tells its memory
    peak: float   # dense bf16 TFLOP/s


CARDS = (Card("RTX 4070, 12 GB", 11.6, 58), Card("RTX 4080, 16 GB", 15.7, 97),
         Card("RTX 4090, 24 GB", 23.6, PEAK["RTX 4090"]), Card("L40S, 48 GB", 44.4, PEAK["L40S"]),
         Card("H100, 80 GB", 79.1, PEAK["H100"]), Card("H200, 141 GB", 139.8, PEAK["H200"]))


def check(card):
    """Raise UserError for a card that no plan can be made for."""
    if card not in PEAK:
        raise UserError(f"--card {card}: its peak is not known here; known are {', '.join(PEAK)}")
