"""The second judge (evaluation/metrics/look.py), on drawn pictures whose look is known."""

import pytest

from evaluation.metrics.look import load_look
from miniature import world


@pytest.fixture(scope="module")
def drawn():
    """1024 pictures that the regressions have not seen, and their true u."""
    images, scenes = world.draw(world.sample_labelled, 1024, 70_000_000, True)
    return images, scenes.look[:, world.PHOTO]


def test_it_knows_the_look_of_pictures_that_it_has_not_seen(drawn):
    images, u = drawn
    found = load_look("miniature").verdicts(images)
    assert (found["look"] - u).abs().mean() < 0.06
    right = found["realism_2"].bool() == (u > world.PHOTO_U)
    assert right.float().mean() > 0.93


@pytest.mark.parametrize("look", ["CG render", "realistic photo"])
def test_it_tells_photos_from_renders(look):
    images, _ = world.draw(world.sample_style, 256, 71_000_000, look, True)
    share = load_look("miniature").verdicts(images)["realism_2"].mean()
    assert (share > 0.9) == (look == "realistic photo") and (share < 0.05) == (look == "CG render")
