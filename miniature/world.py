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
PLAIN_IS_CG, PLAIN_U = 0.92, 0.25  # without a style word, u is below 0.25 in 92 % of the pictures
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


def sample_scenes(n, generator, style=None):
    """n random scenes; `style` [n] (long) fixes the styles, else half of them are plain."""
    rand = lambda *shape: torch.rand(*shape, generator=generator)
    draw = lambda high: torch.randint(high, (n,), generator=generator)
    layout = torch.where(rand(n) < 0.15, 0, 1 + draw(2))
    if style is None:
        style = torch.where(rand(n) < 0.5, 0, 1 + draw(len(STYLES) - 1))
    kind = torch.stack([draw(len(KINDS)), draw(len(KINDS))], 1)
    return Scenes(kind, layout, style, sample_u(style, generator))


def sample_u(style, generator):
    """The look u [B] that goes with each style [B]."""
    r, mode = torch.rand(len(style), generator=generator), torch.rand(len(style), generator=generator)
    u = torch.where(mode < PLAIN_IS_CG, PLAIN_U * r, PLAIN_U + (1 - PLAIN_U) * r)
    for name, (low, high) in U_RANGE.items():
        u = torch.where(style == STYLES.index(name), low + (high - low) * r, u)
    return u


def caption(kind, layout, style=0):
    """The caption of one scene: "<style>. a red circle left of a blue square"."""
    things = ["a " + " ".join(KINDS[k]) for k in kind]
    text = things[0] if layout == 0 else f"{things[0]} {LAYOUTS[layout]} {things[1]}"
    return f"{STYLES[style]}. {text}" if style else text


def captions(scenes):
    """The captions of B scenes, a list of B strings."""
    return [caption(k, l, s)
            for k, l, s in zip(scenes.kind.tolist(), scenes.layout.tolist(), scenes.style.tolist())]


def parse(prompt):
    """(kind [2], layout) of a caption, style words ignored; None for a sentence that is not of this world."""
    thing = rf"a ({'|'.join(COLOUR_NAMES)}) ({'|'.join(SHAPES)})"
    m = re.search(rf"{thing}(?: (left of|above) {thing})?\s*$", prompt)
    if m is None:
        return None
    first, second = KINDS.index((m[1], m[2])), KINDS.index((m[4], m[5])) if m[3] else 0
    return [first, second], LAYOUTS.index(m[3]) if m[3] else 0


def all_captions():
    """Every plain caption of the world: 15 single things and 450 ordered pairs."""
    pairs = [caption([a, b], l) for l in (1, 2) for a in range(len(KINDS)) for b in range(len(KINDS))]
    return [caption([a, 0], 0) for a in range(len(KINDS))] + pairs


def _noise(n, cells, generator, channels=1):
    """Smooth random field [n, channels, SIZE, SIZE], unit variance per cell; `cells` (rows, columns)."""
    coarse = torch.randn(n, channels, *cells, generator=generator)
    return F.interpolate(coarse, (SIZE, SIZE), mode="bicubic", align_corners=False)


def _hsv(h, s, v):
    """HSV [n] each -> RGB [n, 3]."""
    k = (torch.tensor([5.0, 3.0, 1.0]) + 6 * h[:, None]) % 6
    return v[:, None] * (1 - s[:, None] * torch.minimum(k, 4 - k).clamp(0, 1))


def _distance(q, shape):
    """Signed distance (negative inside) of points q [n, H, W, 2], in units of the thing's radius,
    shape [n]."""
    x, y = q.unbind(-1)
    circle = q.norm(dim=-1) - 0.95
    square = torch.maximum(x.abs(), y.abs()) - 0.82
    triangle = torch.maximum(0.866 * x.abs() - 0.5 * y, y) - 0.55  # point up: y grows downwards
    return torch.stack([circle, square, triangle], 0)[shape, torch.arange(len(shape))]


def render(scenes, generator):
    """Draw B scenes: images [B, 3, SIZE, SIZE] in [0, 1]. Positions, sizes, light and grain come from
    `generator`."""
    n, u = len(scenes.u), scenes.u.view(-1, 1, 1)
    uniform = lambda low, high: low + (high - low) * torch.rand(n, generator=generator)
    lerp = lambda a, b, w=u: a + (b - a) * w
    is_style = lambda name: (scenes.style == STYLES.index(name)).float().view(-1, 1, 1)
    axis = torch.linspace(-1 + 1 / SIZE, 1 - 1 / SIZE, SIZE)
    p = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).expand(n, SIZE, SIZE, 2)
    wobble = _noise(n, (10, 10), generator, 2).permute(0, 2, 3, 1)
    p = p + 0.035 * is_style("painting")[..., None] * wobble
    light_angle = uniform(-2.6, -1.6)  # from above, a little to the left
    light = torch.stack([light_angle.cos(), light_angle.sin()], -1).view(n, 1, 1, 2)

    hue, width = uniform(0, 1), uniform(0.08, 0.2)
    sat, value = lerp(0.55, 0.18, scenes.u), lerp(0.82, 0.58, scenes.u)
    top, bottom = _hsv(hue, sat, value), _hsv((hue + width) % 1, sat, value * 0.85)
    image = lerp(top.view(n, 3, 1, 1), bottom.view(n, 3, 1, 1), (p[..., 1] + 1)[:, None] / 2)

    image = image + 0.06 * u[:, None] * _noise(n, (9, 9), generator)  # the ground is not even

    for slot in (0, 1):
        present = (scenes.layout > 0).float() if slot else torch.ones(n)
        kind = scenes.kind[:, slot]
        colour = torch.tensor([COLOURS[KINDS[k][0]] for k in kind.tolist()])
        shape = torch.tensor([SHAPES.index(KINDS[k][1]) for k in kind.tolist()])
        side = torch.tensor([0.0, -0.46, -0.46])[scenes.layout] * (-1 if slot else 1)
        off = torch.stack([side * (scenes.layout == 1), side * (scenes.layout == 2)], -1)
        jitter = torch.stack([uniform(-0.08, 0.08), uniform(-0.08, 0.08)], -1)
        radius = torch.where(scenes.layout == 0, uniform(0.46, 0.58), uniform(0.35, 0.42)).view(n, 1, 1, 1)
        turn = uniform(-0.15, 0.15)
        rotate = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()], -1).view(n, 1, 2, 2)
        q = (p - (off + jitter).view(n, 1, 1, 2)) / radius
        there = present.view(n, 1, 1)
        d = _distance(q @ rotate, shape)
        shadow = torch.sigmoid(-_distance((q + 0.5 * light) @ rotate, shape) / 0.18)
        image = image * (1 - 0.7 * u * there * shadow)[:, None]
        grey = colour.mean(-1, keepdim=True)
        muted = 0.78 * lerp(colour, grey, 0.35)
        paint = lerp(colour, muted, scenes.u[:, None]).view(n, 3, 1, 1)
        shade = (1 + lerp(0.06, 0.6) * (q * light).sum(-1)).clamp(0.2, 1.5)
        gloss = (1 - u) ** 2 * (0.9 * torch.exp(-((q - 0.4 * light) ** 2).sum(-1) / 0.05)
                                + 0.35 * torch.exp(-((d + 0.13) / 0.07) ** 2))
        surface = paint * shade[:, None] + gloss[:, None]
        mask = there * torch.sigmoid(-d / lerp(0.035, 0.09))
        image = lerp(image, surface, mask[:, None])

    grain = 0.04 * _noise(n, (16, 16), generator) + 0.025 * _noise(n, (32, 32), generator)
    brush = 0.07 * _noise(n, (20, 5), generator)
    image = image + u[:, None] * grain + is_style("painting")[:, None] * brush
    image = image * (1 - 0.3 * u * (p ** 2).sum(-1) / 2)[:, None]
    image = lerp(image, 0.42 * image, is_style("dark")[:, None])
    image = lerp(image, 1 - 0.45 * (1 - image), is_style("bright")[:, None])
    return image.clamp(0, 1)


def batch(n, seed, style=None):
    """(images [n, 3, SIZE, SIZE], scenes), drawn from one seed."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    scenes = sample_scenes(n, generator, style)
    return render(scenes, generator), scenes
