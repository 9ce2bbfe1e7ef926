"""The world the miniature lives in: one or two coloured shapes, drawn in a style whose truth is known.

Everything the paper asks of human eyes ("is it a photo? is it the scene that was asked for?") is a number
here, because the picture was drawn from it. The look of a scene runs along one axis, u:

    u = 0  CG render        flat saturated colour, glossy highlight, bright rim, hard edge, clean background
    u = 1  realistic photo  muted colour, directional light, soft cast shadow, vignette, film grain

Captions without a style word ("a red circle left of a blue square") come with pictures that lean to u = 0. A
model trained on them has the "AI look" as its default, and can still be steered by the style words: as
FLUX.1-dev.
"""

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F

SIZE = 64
SHAPES = ["circle", "square", "triangle"]
COLOURS = {"red": (0.93, 0.10, 0.12), "green": (0.08, 0.72, 0.20), "blue": (0.10, 0.25, 0.93),
           "yellow": (0.98, 0.86, 0.08), "white": (0.96, 0.96, 0.97)}
LAYOUTS = ["alone", "left of", "above"]
STYLES = ["", "realistic photo", "CG render", "painting", "dark", "bright"]
U_RANGE = {"realistic photo": (0.8, 1.0), "CG render": (0.0, 0.15), "painting": (0.2, 0.5)}
PLAIN_U = 0.25  # without a style word, u is below this ...
PLAIN_IS_CG = 0.92  # ... in this share of the pictures
PHOTO_U = 0.5  # above it, a picture counts as realistic

COLOUR_NAMES = list(COLOURS)
KINDS = [(c, s) for c in COLOUR_NAMES for s in SHAPES]  # what one slot can hold


@dataclass
class Scenes:
    """B scenes. `kind` [B, 2] indexes KINDS (slot 1 is unused when alone), `layout` and `style` [B] index
    their lists, `u` [B] in [0, 1]."""
    kind: torch.Tensor
    layout: torch.Tensor
    style: torch.Tensor
    u: torch.Tensor

    def __getitem__(self, rows):
        return Scenes(self.kind[rows], self.layout[rows], self.style[rows], self.u[rows])


# ------------------------------------------------------------------------------------- scenes and their words
def sample_scenes(n, generator, style=None):
    """n random scenes; `style` [n] (long) fixes the styles, else half of them are plain."""
    def index(high):
        return torch.randint(high, (n,), generator=generator)

    alone = torch.rand(n, generator=generator) < 0.15
    layout = torch.where(alone, 0, 1 + index(2))
    if style is None:
        plain = torch.rand(n, generator=generator) < 0.5
        style = torch.where(plain, 0, 1 + index(len(STYLES) - 1))
    kind = torch.stack([index(len(KINDS)), index(len(KINDS))], 1)
    return Scenes(kind, layout, style, sample_u(style, generator))


def sample_u(style, generator):
    """The look u [B] that goes with each style [B]."""
    r = torch.rand(len(style), generator=generator)
    mode = torch.rand(len(style), generator=generator)
    u = torch.where(mode < PLAIN_IS_CG, PLAIN_U * r, PLAIN_U + (1 - PLAIN_U) * r)
    for name, (low, high) in U_RANGE.items():
        u = torch.where(style == STYLES.index(name), low + (high - low) * r, u)
    return u


def with_style(style, text):
    """"<style>. <text>"; the empty style adds nothing."""
    return f"{style}. {text}" if style else text


def caption(kind, layout, style=0):
    """The caption of one scene: "<style>. a red circle left of a blue square"."""
    things = ["a " + " ".join(KINDS[k]) for k in kind]
    text = things[0] if layout == 0 else f"{things[0]} {LAYOUTS[layout]} {things[1]}"
    return with_style(STYLES[style], text)


def captions(scenes):
    """The captions of B scenes, a list of B strings."""
    each = zip(scenes.kind.tolist(), scenes.layout.tolist(), scenes.style.tolist(), strict=True)
    return [caption(kind, layout, style) for kind, layout, style in each]


def parse(prompt):
    """(kind [2], layout) of a caption, style words ignored; None for a sentence that is not of this world."""
    thing = rf"a ({'|'.join(COLOUR_NAMES)}) ({'|'.join(SHAPES)})"
    found = re.search(rf"{thing}(?: (left of|above) {thing})?\s*$", prompt)
    if found is None:
        return None
    first = KINDS.index((found[1], found[2]))
    if found[3] is None:
        return [first, 0], 0
    second = KINDS.index((found[4], found[5]))
    return [first, second], LAYOUTS.index(found[3])


def all_captions():
    """Every plain caption of the world: 15 single things and 450 ordered pairs."""
    every = range(len(KINDS))
    texts = [caption([kind, 0], 0) for kind in every]
    for layout in (1, 2):
        for first in every:
            texts += [caption([first, second], layout) for second in every]
    return texts


# ---------------------------------------------------------------------------------------------------- drawing
def uniform(n, low, high, generator):
    """n random numbers from low to high: [n]."""
    return low + (high - low) * torch.rand(n, generator=generator)


def noise(n, cells, generator, channels=1):
    """Smooth random field [n, channels, SIZE, SIZE], unit variance per cell; `cells` (rows, columns)."""
    coarse = torch.randn(n, channels, *cells, generator=generator)
    return F.interpolate(coarse, (SIZE, SIZE), mode="bicubic", align_corners=False)


def lerp(a, b, weight):
    """From a (weight 0) to b (weight 1). Not torch.lerp, which takes no numbers and rounds otherwise."""
    return a + (b - a) * weight


def rgb(hue, saturation, value):
    """HSV [n] each, in [0, 1] -> RGB [n, 3]."""
    k = (torch.tensor([5.0, 3.0, 1.0]) + 6 * hue[:, None]) % 6
    return value[:, None] * (1 - saturation[:, None] * torch.minimum(k, 4 - k).clamp(0, 1))


def is_style(scenes, name):
    """[n, 1, 1]: 1 for the scenes of one style, 0 for the others."""
    return (scenes.style == STYLES.index(name)).float().view(-1, 1, 1)


def distance(q, shape):
    """Signed distance (negative inside) of points q [n, H, W, 2], in units of the thing's radius,
    shape [n]."""
    x, y = q.unbind(-1)
    circle = q.norm(dim=-1) - 0.95
    square = torch.maximum(x.abs(), y.abs()) - 0.82
    triangle = torch.maximum(0.866 * x.abs() - 0.5 * y, y) - 0.55  # point up: y grows downwards
    return torch.stack([circle, square, triangle])[shape, torch.arange(len(shape))]


def ground(scenes, points, generator):
    """The background [n, 3, H, W]: one hue that turns a little from top to bottom, and is not quite even."""
    n = len(scenes.u)
    hue = uniform(n, 0, 1, generator)
    turn = uniform(n, 0.08, 0.2, generator)
    saturation = lerp(0.55, 0.18, scenes.u)
    value = lerp(0.82, 0.58, scenes.u)
    top = rgb(hue, saturation, value).view(n, 3, 1, 1)
    bottom = rgb((hue + turn) % 1, saturation, value * 0.85).view(n, 3, 1, 1)
    image = lerp(top, bottom, (points[..., 1] + 1)[:, None] / 2)  # [n, 3, H, W]
    return image + 0.06 * scenes.u.view(n, 1, 1, 1) * noise(n, (9, 9), generator)


def add_thing(image, scenes, slot, points, light, generator):
    """`image` [n, 3, H, W] with the thing of one slot (0 or 1) and its shadow in it."""
    n = len(image)
    u = scenes.u.view(n, 1, 1)
    kinds = [KINDS[k] for k in scenes.kind[:, slot].tolist()]
    colour = torch.tensor([COLOURS[name] for name, _ in kinds])  # [n, 3]
    shape = torch.tensor([SHAPES.index(name) for _, name in kinds])  # [n]
    present = torch.ones(n) if slot == 0 else (scenes.layout > 0).float()
    present = present.view(n, 1, 1)

    # Where it is: the first thing to the left or above, the second opposite, one alone in the middle.
    side = torch.tensor([0.0, -0.46, -0.46])[scenes.layout]
    if slot == 1:
        side = -side
    offset = torch.stack([side * (scenes.layout == 1), side * (scenes.layout == 2)], -1)  # [n, 2]
    jitter = torch.stack([uniform(n, -0.08, 0.08, generator), uniform(n, -0.08, 0.08, generator)], -1)
    radius_alone = uniform(n, 0.46, 0.58, generator)
    radius_of_two = uniform(n, 0.35, 0.42, generator)
    radius = torch.where(scenes.layout == 0, radius_alone, radius_of_two).view(n, 1, 1, 1)
    angle = uniform(n, -0.15, 0.15, generator)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).view(n, 1, 2, 2)
    q = (points - (offset + jitter).view(n, 1, 1, 2)) / radius  # [n, H, W, 2], in radii from its middle
    d = distance(q @ turn, shape)  # [n, H, W]

    # What it looks like: shadow, paint and shade are the photo's, gloss and the bright rim the CG render's.
    shadow = torch.sigmoid(-distance((q + 0.5 * light) @ turn, shape) / 0.18)
    image = image * (1 - 0.7 * u * present * shadow)[:, None]
    grey = colour.mean(-1, keepdim=True)
    muted = 0.78 * lerp(colour, grey, 0.35)
    paint = lerp(colour, muted, scenes.u[:, None]).view(n, 3, 1, 1)
    shade = (1 + lerp(0.06, 0.6, u) * (q * light).sum(-1)).clamp(0.2, 1.5)
    highlight = 0.9 * torch.exp(-((q - 0.4 * light) ** 2).sum(-1) / 0.05)
    rim = 0.35 * torch.exp(-((d + 0.13) / 0.07) ** 2)
    gloss = (1 - u) ** 2 * (highlight + rim)
    surface = paint * shade[:, None] + gloss[:, None]
    mask = present * torch.sigmoid(-d / lerp(0.035, 0.09, u))
    return lerp(image, surface, mask[:, None])


def render(scenes, generator):
    """Draw B scenes: images [B, 3, SIZE, SIZE] in [0, 1]. Positions, sizes, light and grain come from
    `generator`; the order in which they are drawn is part of what a seed means."""
    n = len(scenes.u)
    u = scenes.u.view(n, 1, 1)
    painting = is_style(scenes, "painting")
    axis = torch.linspace(-1 + 1 / SIZE, 1 - 1 / SIZE, SIZE)
    points = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).expand(n, SIZE, SIZE, 2)
    wobble = noise(n, (10, 10), generator, channels=2).permute(0, 2, 3, 1)  # [n, H, W, 2]
    points = points + 0.035 * painting[..., None] * wobble
    angle = uniform(n, -2.6, -1.6, generator)  # from above, a little to the left
    light = torch.stack([angle.cos(), angle.sin()], -1).view(n, 1, 1, 2)

    image = ground(scenes, points, generator)
    for slot in (0, 1):
        image = add_thing(image, scenes, slot, points, light, generator)

    grain = 0.04 * noise(n, (16, 16), generator) + 0.025 * noise(n, (32, 32), generator)
    brush = 0.07 * noise(n, (20, 5), generator)
    image = image + u[:, None] * grain + painting[:, None] * brush
    vignette = 1 - 0.3 * u * (points ** 2).sum(-1) / 2
    image = image * vignette[:, None]
    image = lerp(image, 0.42 * image, is_style(scenes, "dark")[:, None])
    image = lerp(image, 1 - 0.45 * (1 - image), is_style(scenes, "bright")[:, None])
    return image.clamp(0, 1)


def batch(n, seed, style=None):
    """(images [n, 3, SIZE, SIZE], scenes), drawn from one seed."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    scenes = sample_scenes(n, generator, style)
    return render(scenes, generator), scenes


def redness(images):
    """How red B pictures [B, 3, H, W] in [0, 1] are: the mean of R - (G + B) / 2, [B] in [-1, 1]."""
    r, g, b = images.unbind(1)
    return (r - (g + b) / 2).mean((1, 2))
