"""The order of a run's prompts, and every random draw of an update. Both depend only on the seed, not on the number
of processes or the size of a batch."""

import hashlib

import torch

from engine.errors import UserError

MOST_IMAGES = 10**7      # the most images of a run; their order is drawn before it begins
MOST_HELD_OUT = 10       # one of so many items is held out, at most


# ------------------------------------------------------------------------------------------- order and chance
def prompt_order(n, count, seed):
    """The first `count` numbers of a series of seeded permutations of 0 ... n - 1: a list."""
    generator = torch.Generator().manual_seed(seed)
    order = []
    while len(order) < count:
        order += torch.randperm(n, generator=generator).tolist()
    return order[:count]


def hold_out(items, n):
    """(held out, the others) of a list: n items, evenly spread, but at most one of MOST_HELD_OUT. An item that is equal
    to one that is held out is not among the others."""
    each = list(dict.fromkeys(items))
    n = min(n, len(each) // MOST_HELD_OUT)
    held_out = [each[i * len(each) // n] for i in range(n)]
    without = set(held_out)
    return held_out, [item for item in items if item not in without]


def check_count(steps, images):
    """Raise UserError if a run of steps x images would have more than MOST_IMAGES images."""
    if steps * images > MOST_IMAGES:
        raise UserError(f"--steps {steps}: with {images} images an update (--global-batch) a run would see more than "
                        f"{MOST_IMAGES}")


class Curriculum:
    """Which prompts a process uses in which update.

    `prompts`: those that this process uses in the whole run, each once; only these are encoded. `rows[step]`: the
    indices into `prompts` for step 1, 2, ...
    """

    def __init__(self, texts, steps, images, mine, seed, group=1):
        """texts: all prompts; images: images of an update, of all processes, `group` of them for each prompt drawn;
        mine: the slice of these images that this process makes. Raises UserError as `check_count`."""
        check_count(steps, images)
        order = []
        for number in prompt_order(len(texts), steps * images // group, seed):
            order += [number] * group
        self.meet({step: order[(step - 1) * images:step * images][mine] for step in range(1, steps + 1)})
        self.prompts = [texts[number] for number in self.met]
        self.texts = {"--prompts": texts}  # --resume compares these texts, and the files in `places`
        self.places = {}

    def meet(self, drawn):
        """Set `met`, the sorted numbers of all prompts that are used, and `rows`. drawn: {step: numbers of prompts}."""
        self.met = sorted({number for numbers in drawn.values() for number in numbers})
        place = {number: row for row, number in enumerate(self.met)}
        self.rows = {step: [place[number] for number in numbers] for step, numbers in drawn.items()}

    def grid(self, step):
        """(rows, columns) of tokens of an update's pictures; None: as --size says."""
        return None

    def says(self, step):
        """What the log is told about an update's pictures: {name: text or number}."""
        return {}

    def latents(self, rows):
        """Clean latents x0 [B, N, C] of some rows; None: the model makes them by a rollout."""
        return None


class Chance:
    """All the chance of one update, from the seed and the update's number alone.

    Every draw is made for all `images` of the update, and `mine` is the slice of one batch. So an image gets the same
    draws on any number of processes and with any --batch.
    """

    def __init__(self, seed, step, images, mine):
        # torch's generator on a CPU uses the lower 32 bits of its seed. Pictures are sampled from noise seeds
        # below 2**31; an update's is above, so that no update trains on the noise of a held-out picture.
        digest = hashlib.sha256(f"update {step} of seed {seed}".encode()).digest()
        self.generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big") | 2**31)
        self.images = images
        self.mine = mine

    def normal(self, *shape):
        """Standard normal numbers [B, *shape], one draw for each image."""
        return torch.randn(self.images, *shape, generator=self.generator)[self.mine]

    def whole(self, low, high):
        """One whole number from low to high, both included, for all images."""
        return torch.randint(low, high + 1, (), generator=self.generator).item()

    def some_each(self, n, count):
        """`count` of the numbers 0 ... n - 1 for each image, long [B, count]."""
        drawn = [torch.randperm(n, generator=self.generator)[:count] for _ in range(self.images)]
        return torch.stack(drawn)[self.mine]

    def normal_shared(self, *shape):
        """Standard normal numbers [B, *shape], one draw for all images."""
        batch = len(range(self.images)[self.mine])
        return torch.randn(1, *shape, generator=self.generator).expand(batch, *shape)
