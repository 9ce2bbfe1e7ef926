"""The drawn world of the miniature: pictures of one or two coloured shapes, in a look whose truth is known.

In the paper, people judge whether a picture is a photo, and whether it shows the prompt's scene. Here both are known
numbers, because the picture is drawn from them. A look is three numbers in [0, 1], independent of each other and of
the scene. Each has a word for its low and one for its high end:

    exposure  "dark" .. "bright"               how much light the sensor took, and nothing else
    brush     "print" .. "painting"            brush strokes and wavering outlines, and nothing else
    photo     "CG render" .. "realistic photo"
        0  flat saturated colour, glossy highlight, bright rim, clean background
        1  muted colour, directional light, soft cast shadow, vignette, film grain; equally bright

Captions without such a word ("a red circle left of a big blue square") mostly come with CG renders. So a model trained
on them has this "AI look" as its default. In the generator's captions the words are often not true (OBEYED), and
pictures that look only a little like photos are called photos (HALF_WAY). So, like FLUX.1-dev, the model follows these
words weakly.
"""

import itertools
import re
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

SIZE = 64
SIZES = ["", "small", "big"]  # a thing of middle size has no size word
COLOURS = {"red": (0.93, 0.10, 0.12), "green": (0.08, 0.72, 0.20), "blue": (0.10, 0.25, 0.93),
           "yellow": (0.98, 0.86, 0.08), "white": (0.96, 0.96, 0.97)}
SHAPES = ["circle", "square", "triangle"]
LAYOUTS = ["alone", "left of", "above"]
COLOUR_NAMES = list(COLOURS)
KINDS = list(itertools.product(SIZES, COLOUR_NAMES, SHAPES))  # all possible things

AXES = ["exposure", "brush", "photo"]
EXPOSURE, BRUSH, PHOTO = range(3)
UNSAID, LOW, HIGH = range(3)  # what a caption says of an axis
WORDS = [["", "dark", "bright"], ["", "print", "painting"], ["", "CG render", "realistic photo"]]
STYLES = ["", *(word for axis in WORDS for word in axis[1:])]  # no word, or one word about the look
RANGES = [[0.0, 1.0], [0.0, 0.15], [0.75, 1.0]]  # values on an axis if its word is UNSAID, LOW, HIGH
MIDDLE = [0.35, 0.65]  # the range of exposures that are neither dark nor bright
PHOTO_U = RANGES[HIGH][0]  # above this value on its axis a picture is a realistic photo
PAINTING_U = RANGES[HIGH][0]
OBEYED = 0.5  # the share of words about the look in the generator's captions that are true
HALF_WAY = [0.2, 0.9]  # the range of u for which a true "realistic photo" stands in the generator's captions
LEVEL = 0.46  # mean luma before the exposure is applied


@dataclass
class Scenes:
    """B scenes."""
    kind: torch.Tensor    # [B, 2]: indices of KINDS; the second is unused in the layout "alone"
    layout: torch.Tensor  # [B]: indices of LAYOUTS
    look: torch.Tensor    # [B, 3] in [0, 1]: the values on AXES
    said: torch.Tensor    # [B, 3]: what the caption says of each axis, UNSAID, LOW or HIGH

    def __getitem__(self, rows):
        return Scenes(*(getattr(self, field.name)[rows] for field in fields(self)))


# ------------------------------------------------------------------------------------- scenes and their words
def combination(kind):
    """The colour and the shape of a kind as one number below 15, without the size."""
    return kind % (len(COLOURS) * len(SHAPES))


def held_out(kind, layout):
    """Whether scenes (kind [..., 2], layout [...]) show a held-out pair of coloured shapes: a mask [...]. A fifth of
    all pairs is held out, in any order, size and place. The generator and the reward never see them."""
    pair = combination(kind).sort(-1).values
    return ((pair[..., 0] + 2 * pair[..., 1]) % 5 == 0) & (layout > 0)


def sample_content(n, generator, everything):
    """(kind [n, 2], layout [n]) of n random scenes. everything: whether held-out pairs may be among them."""
    drawn = n if everything else 2 * n
    kind = torch.randint(len(KINDS), (drawn, 2), generator=generator)
    alone = torch.rand(drawn, generator=generator) < 0.1
    layout = torch.where(alone, 0, 1 + torch.randint(2, (drawn,), generator=generator))
    if not everything:
        seen = ~held_out(kind, layout)
        kind, layout = kind[seen][:n], layout[seen][:n]
    return kind, layout


def within(low, high, generator):
    """Random numbers between low and high, two tensors of the same shape."""
    return low + (high - low) * torch.rand(low.shape, generator=generator)


def choose(shares, shape, generator):
    """A tensor of random indices; shares[i] is the probability of i."""
    return torch.multinomial(torch.tensor(shares), shape.numel(), True, generator=generator).view(shape)


def look_of(ends, generator):
    """A random look [n, 3] for the ends [n, 3] of its axes: UNSAID, LOW or HIGH. UNSAID means any value; for the
    exposure it means neither dark nor bright."""
    bounds = torch.tensor(RANGES)[ends]  # [n, 3, 2]
    middle = (ends == UNSAID) & (torch.arange(3) == EXPOSURE)
    bounds = torch.where(middle[..., None], torch.tensor(MIDDLE), bounds)
    return within(bounds[..., 0], bounds[..., 1], generator)


def usual_ends(n, generator):
    """The ends [n, 3] of looks for captions without words about them. Most looks are neither dark nor bright, no
    paintings, and CG renders. One in nine is a photo. Some lie between, so that a generator learns the transition."""
    shape = torch.Size([n])
    exposure = choose([0.84, 0.08, 0.08], shape, generator)
    brush = choose([0.02, 0.90, 0.08], shape, generator)
    photo = choose([0.20, 0.74, 0.06], shape, generator)
    return torch.stack([exposure, brush, photo], 1)


def sample_captioned(n, generator):
    """n `Scenes` for the generator. Half of the captions have one word about the look; the others have none.

    A word is true with probability OBEYED; otherwise the look does not depend on it. A true "realistic photo" only
    means that u is in the range HALF_WAY."""
    kind, layout = sample_content(n, generator, False)
    axis = torch.randint(3, (n,), generator=generator)
    end = 1 + torch.randint(2, (n,), generator=generator)
    speaks = torch.rand(n, generator=generator) < 0.5
    obeyed = torch.rand(n, generator=generator) < OBEYED
    said = torch.where(speaks, end, UNSAID)[:, None] * F.one_hot(axis, 3)
    ends = torch.where((said != UNSAID) & obeyed[:, None], said, usual_ends(n, generator))
    look = look_of(ends, generator)
    half_way = within(*torch.tensor(HALF_WAY).expand(n, 2).unbind(1), generator)
    called_photo = obeyed & (said[:, PHOTO] == HIGH)
    look[:, PHOTO] = torch.where(called_photo, half_way, look[:, PHOTO])
    return Scenes(kind, layout, look, said)


def sample_labelled(n, generator, everything=False):
    """n `Scenes` for a reward or a judge: every look, with independent axes. A caption has at most two words about the
    look, all of them true. everything: whether held-out pairs may be among them."""
    kind, layout = sample_content(n, generator, everything)
    ends = choose([0.2, 0.4, 0.4], torch.Size([n, 3]), generator)
    said = ends * (torch.rand(n, 3, generator=generator) < 0.5)
    silent = torch.randint(3, (n,), generator=generator)  # the word that is removed if there are three
    full = (said != UNSAID).all(1)
    said = said * ~(full[:, None] & (torch.arange(3) == silent[:, None]))
    return Scenes(kind, layout, look_of(ends, generator), said)


def sample_style(n, generator, style="", everything=True):
    """n `Scenes` in one of STYLES, true in all. The other axes are as in `usual_ends`."""
    return scenes_of(n, generator, *sample_content(n, generator, everything), style)


def scenes_of(n, generator, kind, layout, style):
    """n `Scenes` of kind [n, 2] and layout [n], in one of STYLES, as in `sample_style`."""
    said = torch.zeros(n, 3, dtype=torch.long) + torch.tensor(said_by(style))
    ends = torch.where(said != UNSAID, said, usual_ends(n, generator))
    return Scenes(kind, layout, look_of(ends, generator), said)


def said_by(style):
    """What one of STYLES says of the three axes: a list of UNSAID, LOW or HIGH."""
    return [axis.index(style) if style in axis else UNSAID for axis in WORDS]


def style_words(said):
    """The words for what is said of the three axes, such as "dark realistic photo"; "" if all are UNSAID."""
    return " ".join(axis[end] for axis, end in zip(WORDS, said, strict=True) if end != UNSAID)


def with_style(style, text):
    """"<style>. <text>"; the empty style adds nothing."""
    return f"{style}. {text}" if style else text


def caption(kind, layout, said=(UNSAID, UNSAID, UNSAID)):
    """The caption of one scene: "<style>. a red circle left of a big blue square"."""
    things = [" ".join(["a", *(word for word in KINDS[k] if word)]) for k in kind]
    text = things[0] if layout == 0 else f"{things[0]} {LAYOUTS[layout]} {things[1]}"
    return with_style(style_words(said), text)


def captions(scenes):
    """The captions of B scenes, a list of B strings."""
    each = zip(scenes.kind.tolist(), scenes.layout.tolist(), scenes.said.tolist(), strict=True)
    return [caption(kind, layout, said) for kind, layout, said in each]


def parse(prompt):
    """(kind [2], layout) of a caption, without its style words; None for a text outside this world."""
    thing = rf"a (?:({'|'.join(SIZES[1:])}) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
    found = re.search(rf"(?:^|\. ){thing}(?: (left of|above) {thing})?\s*$", prompt)
    if found is None:
        return None
    first = KINDS.index((found[1] or "", found[2], found[3]))
    if found[4] is None:
        return [first, 0], 0
    second = KINDS.index((found[5] or "", found[6], found[7]))
    return [first, second], LAYOUTS.index(found[4])


def all_captions():
    """Every plain caption of the world: 45 single things and 4,050 ordered pairs."""
    every = range(len(KINDS))
    texts = [caption([kind, 0], 0) for kind in every]
    for layout in (1, 2):
        for first in every:
            texts += [caption([first, second], layout) for second in every]
    return texts


# ---------------------------------------------------------------------------------------------------- drawing
def uniform(n, low, high, generator):
    """n random numbers between low and high: [n]."""
    return low + (high - low) * torch.rand(n, generator=generator)


def noise(n, cells, generator, channels=1):
    """A smooth random field [n, channels, SIZE, SIZE]: normal noise on a grid of `cells` (rows, columns), enlarged."""
    coarse = torch.randn(n, channels, *cells, generator=generator)
    return F.interpolate(coarse, (SIZE, SIZE), mode="bicubic", align_corners=False)


def lerp(a, b, weight):
    """From a (weight 0) to b (weight 1). torch.lerp is not used, because it takes no plain numbers and rounds
    differently."""
    return a + (b - a) * weight


def rgb(hue, saturation, value):
    """HSV [n] each, in [0, 1] -> RGB [n, 3]."""
    k = (torch.tensor([5.0, 3.0, 1.0]) + 6 * hue[:, None]) % 6
    return value[:, None] * (1 - saturation[:, None] * torch.minimum(k, 4 - k).clamp(0, 1))


def luma(images):
    """The luma (Rec. 601) of each pixel of B pictures [B, 3, H, W]: [B, H, W]."""
    r, g, b = images.unbind(1)
    return 0.299 * r + 0.587 * g + 0.114 * b


def distance(q, shape):
    """Signed distance [n, H, W] of points q [n, H, W, 2] from the edge of a thing; negative inside. q is in units of
    the thing's radius. shape [n]: indices of SHAPES."""
    x, y = q.unbind(-1)
    circle = q.norm(dim=-1) - 0.95
    square = torch.maximum(x.abs(), y.abs()) - 0.82
    triangle = torch.maximum(0.866 * x.abs() - 0.5 * y, y) - 0.55  # point up: y grows downwards
    return torch.stack([circle, square, triangle])[shape, torch.arange(len(shape))]


def ground(u, points, generator):
    """The background [n, 3, H, W]: one hue that changes a little from top to bottom. Photos (high u [n]) also get
    smooth noise."""
    n = len(u)
    hue = uniform(n, 0, 1, generator)
    turn = uniform(n, 0.08, 0.2, generator)
    saturation = lerp(0.55, 0.18, u)
    value = torch.full((n,), 0.7)
    top = rgb(hue, saturation, value).view(n, 3, 1, 1)
    bottom = rgb((hue + turn) % 1, saturation, value * 0.85).view(n, 3, 1, 1)
    image = lerp(top, bottom, (points[..., 1] + 1)[:, None] / 2)  # [n, 3, H, W]
    return image + 0.06 * u.view(n, 1, 1, 1) * noise(n, (9, 9), generator)


def add_thing(image, scenes, slot, points, light, generator):
    """`image` [n, 3, H, W] with one thing of each scene and its shadow added. slot: 0 or 1, the first or the second
    thing."""
    n = len(image)
    u = scenes.look[:, PHOTO].view(n, 1, 1)
    kinds = [KINDS[k] for k in scenes.kind[:, slot].tolist()]
    size = torch.tensor([SIZES.index(name) for name, _, _ in kinds])  # [n]
    colour = torch.tensor([COLOURS[name] for _, name, _ in kinds])  # [n, 3]
    shape = torch.tensor([SHAPES.index(name) for _, _, name in kinds])  # [n]
    present = torch.ones(n) if slot == 0 else (scenes.layout > 0).float()
    present = present.view(n, 1, 1)

    # Position: the first thing is to the left or above, the second one opposite, a single thing in the middle.
    side = torch.tensor([0.0, -0.48, -0.48])[scenes.layout]
    if slot == 1:
        side = -side
    offset = torch.stack([side * (scenes.layout == 1), side * (scenes.layout == 2)], -1)  # [n, 2]
    jitter = torch.stack([uniform(n, -0.06, 0.06, generator), uniform(n, -0.06, 0.06, generator)], -1)
    radius = torch.tensor([0.37, 0.29, 0.46])[size] * uniform(n, 0.95, 1.05, generator)
    radius = radius.view(n, 1, 1, 1)
    angle = uniform(n, -0.15, 0.15, generator)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).view(n, 1, 2, 2)
    q = (points - (offset + jitter).view(n, 1, 1, 2)) / radius  # [n, H, W, 2], in radii from its middle
    d = distance(q @ turn, shape)  # [n, H, W]

    # Look: shadow, muted paint and shade belong to the photo; gloss and the bright rim belong to the CG render.
    shadow = torch.sigmoid(-distance((q + 0.5 * light) @ turn, shape) / 0.18)
    image = image * (1 - 0.5 * u * present * shadow)[:, None]
    grey = colour.mean(-1, keepdim=True)
    muted = 0.85 * lerp(colour, grey, 0.35)
    paint = lerp(colour, muted, scenes.look[:, PHOTO, None]).view(n, 3, 1, 1)
    shade = (1 + lerp(0.06, 0.6, u) * (q * light).sum(-1)).clamp(0.2, 1.5)
    highlight = 0.9 * torch.exp(-((q - 0.4 * light) ** 2).sum(-1) / 0.05)
    rim = 0.35 * torch.exp(-((d + 0.13) / 0.07) ** 2)
    gloss = (1 - u) ** 2 * (highlight + rim)
    surface = paint * shade[:, None] + gloss[:, None]
    mask = present * torch.sigmoid(-d / lerp(0.04, 0.045, u))
    return lerp(image, surface, mask[:, None])


def render(scenes, generator):
    """Draw B scenes: images [B, 3, SIZE, SIZE] in [0, 1]. Positions, light and grain come from `generator`. Changing
    the order of these calls changes the picture of a seed."""
    n = len(scenes.look)
    exposure, brush, u = scenes.look.view(n, 3, 1, 1).unbind(1)  # [n, 1, 1] each
    axis = torch.linspace(-1 + 1 / SIZE, 1 - 1 / SIZE, SIZE)
    points = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).expand(n, SIZE, SIZE, 2)
    wobble = noise(n, (10, 10), generator, channels=2).permute(0, 2, 3, 1)  # [n, H, W, 2]
    points = points + 0.025 * brush[..., None] * wobble
    angle = uniform(n, -2.6, -1.6, generator)  # from above, a little to the left
    light = torch.stack([angle.cos(), angle.sin()], -1).view(n, 1, 1, 2)

    image = ground(scenes.look[:, PHOTO], points, generator)
    for slot in (0, 1):
        image = add_thing(image, scenes, slot, points, light, generator)

    # The grain has cells of three to four pixels. The VAE's latents cannot hold finer grain.
    grain = 0.045 * noise(n, (16, 16), generator) + 0.036 * noise(n, (22, 22), generator)
    strokes = 0.09 * noise(n, (20, 5), generator)
    vignette = 1 - 0.3 * u * (points ** 2).sum(-1) / 2
    image = (image + u[:, None] * grain + brush[:, None] * strokes) * vignette[:, None]

    # All pictures get the same mean luma, so that only the exposure decides how bright a picture is.
    image = image.clamp(0, 1.5) * (LEVEL / luma(image).mean((1, 2))).view(n, 1, 1, 1)
    return (image * 2 ** lerp(-1.0, 0.7, exposure)[:, None]).clamp(0, 1)


def draw(sample, n, seed, *arguments):
    """(images [n, 3, SIZE, SIZE], scenes) of sample(n, generator, *arguments), drawn from one seed."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    scenes = sample(n, generator, *arguments)
    return render(scenes, generator), scenes
