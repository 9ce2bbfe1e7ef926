"""The order in which a run meets its prompts, and every random draw of an update. Both come from the seed
alone: neither the number of processes nor the size of a batch changes them."""

import hashlib

import torch

from engine.errors import UserError

MOST_IMAGES = 10**7      # of a run: their order is drawn before it begins


# ------------------------------------------------------------------------------------------- order and chance
def prompt_order(n, count, seed):
    """The first `count` of an endless series of seeded permutations of n prompts: a list of numbers."""
    generator = torch.Generator().manual_seed(seed)
    order = []
    while len(order) < count:
        order += torch.randperm(n, generator=generator).tolist()
    return order[:count]


def check_count(steps, images):
    """Raise UserError if a run would draw more than can be put in order."""
    if steps * images > MOST_IMAGES:
        raise UserError(f"--steps {steps}: with {images} images an update (--global-batch) a run would see more than "
                        f"{MOST_IMAGES}")


class Curriculum:
    """Which prompts a process meets in which update. `prompts` are those that it meets at all, each once, so
    that no other need be encoded; `rows[step]` are the numbers among them, for step 1, 2, ..."""

    def __init__(self, texts, steps, images, mine, seed, group=1):
        """texts: all prompts; images: how many an update of all processes makes, `group` of each prompt it
        draws; mine: the slice of those that this process makes. Raises UserError if they are too many to be
        put in order."""
        check_count(steps, images)
        order = []
        for number in prompt_order(len(texts), steps * images // group, seed):
            order += [number] * group
        self.meet({step: order[(step - 1) * images:step * images][mine] for step in range(1, steps + 1)})
        self.prompts = [texts[number] for number in self.met]
        self.texts = {"--prompts": texts}  # what --resume compares: texts and files
        self.places = {}

    def meet(self, drawn):
        """drawn: {step: numbers among all}."""
        self.met = sorted({number for numbers in drawn.values() for number in numbers})
        place = {number: row for row, number in enumerate(self.met)}
        self.rows = {step: [place[number] for number in numbers] for step, numbers in drawn.items()}

    def grid(self, step):
        """(rows, columns) of tokens of an update's pictures; None: --size says it."""
        return None

    def latents(self, rows):
        """Clean latents [B, N, C] of what some rows show; None: the model makes its own."""
        return None


class Chance:
    """All the chance of one update, from the seed and the update's number alone.

    Every draw is made for all `images` of the update, and `mine` cuts out those of one batch: so neither the
    number of processes nor --accumulate changes what an image sees.
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

    def some(self, n, count):
        """`count` of the numbers 0 ... n - 1, for all images."""
        return torch.randperm(n, generator=self.generator)[:count].tolist()

    def normal_shared(self, *shape):
        """Standard normal numbers [B, *shape], one draw for all images."""
        batch = len(range(self.images)[self.mine])
        return torch.randn(1, *shape, generator=self.generator).expand(batch, *shape)
