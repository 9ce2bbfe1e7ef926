"""The set-up of train.py: all that an update needs is read, encoded and loaded. Also the batches of an update."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

import command
import direct_align as da
import flow
import recipe
import rewards
import srpo_reward as sr
from engine.data import cache, draws, photographs, prompt_files
from engine.data.cache import Cache
from engine.data.digests import known_digest
from engine.errors import UserError
from engine.memory import adamw, cards, counts, layouts, modes, parallel, whole_run
from engine.model import float8, trained
from engine.model.folder import Model
from engine.run import made_by
from engine.run.contents import FLAGS, Contents
from engine.run.folder import RunFolder
from engine.stopping import Stopping
from evaluation import landing, watch

VARIANTS = 16  # of a compiled block, at most: a LoRA has 8, and with a rollout in float8 more


class Share(NamedTuple):
    """One process's part of an update."""
    images: int      # that it makes
    batch: int       # images at a time
    accumulate: int  # batches, one after the other, whose gradients are averaged


class Batch(NamedTuple):
    """The input of an update, for B images."""
    prompts: list          # B texts
    c: flow.Condition      # the same, as the network reads them
    x0: torch.Tensor       # clean latents [B, N, C] of photographs; None: the model rolls out its own
    start: torch.Tensor    # [B, N, C] the noise from which a rollout starts
    eps: torch.Tensor      # [B, N, C] the noise prior that is injected
    texts: sr.Texts        # what the rewards read: the prompts alone, with a word of --control, with one of --neg
    middles: list          # for each of --injections: the cells m [B] of the training grid where the branches meet
    chance: draws.Chance = None  # for a method's further random draws
    step: int = 0          # the update's number, from 1


@dataclass
class Run:
    """All that the loop needs beside the flags."""
    world: parallel.World
    model: Model
    net: flow.Flow
    reward: sr.Rewards
    losses: Callable       # the --method's: (flags, net, reward, `Batch`) -> loss terms
    share: Share           # this process's part of an update
    job: counts.Job
    curriculum: draws.Curriculum
    embeddings: flow.Embeddings
    watched: watch.Watch
    optimizer: torch.optim.Optimizer
    grid: tuple            # (rows, columns) of tokens of a picture
    contents: Contents = None   # digests of what was read, to be compared when the run is resumed
    folder: RunFolder = None    # None: nothing is written
    stopping: Stopping = None   # whether the run is asked to stop; None: it never is
    made_by: dict = None        # the code, libraries and devices

    def check_stop(self):
        """Raise Stopped, in all processes at the same place, if any was asked to stop."""
        if self.stopping is not None:
            self.stopping.check(self.world)

    def batches(self, a, step):
        """The `Batch`es of this process in an update, one after the other. Raises Stopped before any of them."""
        for part in range(self.share.accumulate):
            self.check_stop()
            yield self.batch(a, step, part)

    def batch(self, a, step, part):
        """This process's batch number `part`, from 0, in an update: a `Batch`."""
        device = self.net.device
        size = self.share.batch
        first = self.world.rank * self.share.images + part * size
        chance = draws.Chance(a.seed, step, a.global_batch, slice(first, first + size))
        rows = self.curriculum.rows[step][part * size:(part + 1) * size]
        texts = [self.curriculum.prompts[row] for row in rows]
        grid = self.curriculum.grid(step) or self.grid
        online = a.online_from is not None and step >= a.online_from
        x0 = None if online else self.curriculum.latents(rows)
        shape = (grid[0] * grid[1], self.net.transformer.config.in_channels)
        of_its_own = a.noise == "independent" or x0 is not None
        start = chance.normal(*shape) if of_its_own else chance.normal_shared(*shape)
        eps = chance.normal_shared(*shape) if a.noise == "fresh" else start
        middles = []
        are_read = "injections" not in recipe.METHODS[a.method].never_reads
        for _ in range(a.injections if are_read else 1):  # another number would change a method's further draws
            drawn = da.draw_middle(a.global_batch, a.cells, chance.generator)[chance.mine]
            middles.append(parallel.moved(drawn, device))
        x0 = None if x0 is None else parallel.moved(x0, device)
        read = sr.texts_of(texts, *words_of(a, step))
        start, eps = parallel.moved(start, device), parallel.moved(eps, device)
        return Batch(texts, self.embeddings.condition(rows, grid, device), x0, start, eps, read, middles, chance, step)


def share_of(a, processes):
    """The `Share` of each process. --global-batch is divided among the processes, so an update is the same on any
    number of them. Raises UserError for a number that does not divide it; the message lists those that do."""
    if a.global_batch % processes:
        counts = ", ".join(map(str, divisors(a.global_batch)))
        raise UserError(f"--global-batch {a.global_batch}: cannot be divided among {processes} processes; it can among "
                        f"{counts}")
    images = a.global_batch // processes
    method = recipe.METHODS[a.method]
    group = method.group(a)
    if images % group:
        raise UserError(f"--method {a.method}: a process makes {images} of the {a.global_batch} images of "
                        f"--global-batch, which is no multiple of --group {group}; --global-batch {processes * group} "
                        "is")
    if method.optimizer_steps > 1:
        return Share(images, images, 1)  # it steps inside an update, so it needs all its images at once
    batches = [n for n in divisors(images) if n % group == 0]
    batch = max([n for n in batches if n <= a.batch], default=batches[0])
    return Share(images, batch, images // batch)


def divisors(n):
    """The whole numbers that divide n, from 1 on."""
    return [d for d in range(1, n + 1) if n % d == 0]


def job(a, model):
    """What the plan needs to know of a run with a `Model`."""
    configs = model.configs
    rows, columns = model.grid(a.size, a.size)
    method = recipe.METHODS[a.method]
    calls = method.calls(a)
    at_once = a.batch if method.optimizer_steps == 1 else a.global_batch
    return counts.Job(
        model=model.name, transformer=configs.transformer, vae=configs.vae, text_tokens=configs.text_tokens,
        text_parameters=configs.text_parameters,
        size=a.size, image_tokens=rows * columns, images=a.global_batch, batch=at_once, updates=a.steps,
        rollout_steps=calls.without_gradient, calls=calls.with_gradient, checkpointing=a.checkpointing,
        cfg=None if a.cfg is None else a.cfg_gradient, replicas=a.replicas, lora=a.lora, memory=a.memory,
        reward_networks=partial(rewards.image_networks, a.reward, sr.texts_read(a.form, a.cfg_k)),
        together=calls.together, rollout_dtype=a.rollout_dtype, reward_apart=a.reward_device is not None)


def settle(a, model, world):
    """Choose --memory and --eval where they are left open, and print why. Raises UserError, with flags that would fit,
    if nothing fits."""
    own = world.decide(world.beside, a.reward_device)
    a.memory, why = world.decide(cards.settle, job(a, model), world, own)
    if why:
        world.say(why)
    settle_evaluation(a, model, world.say)


def settle_evaluation(a, model, say):
    """Choose --eval where it is left open. say: prints a line."""
    if a.eval is None:
        planned = job(a, model)
        a.eval = whole_run.evaluated(planned, a.eval_steps)
        share = whole_run.share_of_evaluation(planned, a.eval_steps, a.eval or whole_run.EVALUATED[-1])
        few = whole_run.EVALUATED[-1]
        say(f"--eval {a.eval}: {share:.0%} of the updates' work" if a.eval else
            f"--eval 0: no table of results, as {few} pictures would be {share:.0%} of the updates' work; --eval {few} "
            "makes it")


def set_up(a, model, world, folder=None, stopping=None):
    """Read, encode and load everything: a `Run`. Nothing is written but to the cache. Raises UserError."""
    flow.needs_gpu(model)
    planned = job(a, model)
    share = share_of(a, world.size)
    texts = texts_of(a)
    parts = trained.check(a.weights, model, a.lora)
    for note in trained.notes(a.weights):
        world.say(note)
    model.fetch(parts)
    shown = []
    if a.images is not None:
        texts, shown, photos = photographs_of(a, model, world, texts)
    tell_held_out(a, texts, world)
    order = (a.steps, a.global_batch, world.rows(share.images), a.seed)
    if a.images is None:
        curriculum = draws.Curriculum(texts.training, *order, recipe.METHODS[a.method].group(a))
    else:
        curriculum = photographs.Album(photos, model.unit, *order)
    both = curriculum.prompts + texts.watched + texts.held_out
    references = landing.references(a, model, world)
    world.say(f"loading {model.name}: its text encoders, then the reward, then the network")
    kept = Cache(cache.folder_of(a.cache, flow.is_full_size(model)))
    embeddings = flow.encode_here(model, both, world, kept)
    say_truncated(a, world, embeddings, len(curriculum.prompts))
    reward = rewards.load_rewards(a.reward, world.beside(a.reward_device) or world.device)
    must_tell_apart(a, reward, both, world)
    net = flow.load(model, a.weights, world.device, world.dtype, world, layouts.Layout(a.lora, a.memory, a.seed))
    net.guide(a.cfg, embeddings.empty, a.cfg_gradient, a.cfg_keep_norm)
    if a.images is not None:
        # what latents depend on beside their picture
        vae = [known_digest([model.part("vae")], kept), str(world.dtype), world.device.type]
        curriculum.encode(net.encode, vae, kept, world)
    scored = texts.watched + texts.held_out + [photograph.caption for photograph in references]
    optimizer = make_ready(a, net, reward, curriculum, scored, world.size)
    first = len(curriculum.prompts)
    last = first + len(texts.watched)
    watching = watch.Watch(a, model, world, net, reward, watch.Prompts(texts.watched, embeddings.part(first, last)),
                           watch.Prompts(texts.held_out, embeddings.part(last, len(both))), stopping)
    watching.titles = titles_of(a, texts)
    watching.photographs = [photographs.pixels(photograph, model.unit)[0] for photograph in shown]
    watching.level = landing.level(a, model, references, net, reward, world)
    said = curriculum.texts | {"--watch-prompts": texts.watched, "--eval-prompts": texts.held_out,
                               FLAGS: [command.as_line(a, fixed=True)]}
    places = curriculum.places | {"--model": [model.part(part) for part in parts]}
    if a.weights:
        places["--weights"] = [trained.place_of(a.weights)]
    return Run(world, model, net, reward, recipe.METHODS[a.method].load(), share, planned, curriculum, embeddings,
               watching, optimizer, net.grid(a.size, a.size), contents_of(said, places, reward), folder, stopping,
               made_by.now(world))


def say_truncated(a, world, embeddings, own):
    """Say how many prompts are truncated: of the first `own`, which are trained on, and of those that are watched."""
    for what, part in (("--prompts" if a.images is None else "--images", embeddings.part(0, own)),
                       ("--watch-prompts and --eval-prompts", embeddings.part(own, len(embeddings.txt)))):
        part.say_truncated(world.say, f"prompts of {what}")


def must_tell_apart(a, reward, prompts, world):
    """Raise UserError if there would be nothing to learn. That is so if --form is relative, and no trained reward tells
    the wanted from the unwanted words of an update. A reward of the picture alone needs --form plain or sgp. It is also
    so if a reward gives two different pictures one score. A line names the words that a reward's tokenizer does not
    know."""
    relative = a.form not in ("plain", "sgp")
    labels = ", ".join(label for label, (_, weight) in reward.parts.items() if weight)
    for step in range(max(len(a.control), len(a.neg))):
        control, neg = words_of(a, step)
        _, (wanted, *_), (unwanted, *_) = sr.texts_of(prompts[:1], control, neg)
        alike = [part.reads_alike(wanted, unwanted) for part, _ in reward.trained]
        if all(alike) and relative:
            raise UserError(f"--reward {labels}: reads --control {control} and --neg {neg} alike, so --form {a.form} "
                            "has nothing to learn; give words that it knows, or its own tokenizer; a reward of the "
                            "picture alone needs --form plain")
        if all(alike) and step == 0:
            world.say(f"--reward {labels}: reads --control {control} and --neg {neg} alike")
    chance = torch.Generator().manual_seed(0)
    pictures = torch.stack([torch.rand(3, a.size, a.size, generator=chance), torch.full((3, a.size, a.size), 0.5)])
    for label, (part, weight) in reward.parts.items():
        with torch.no_grad():
            one, other = part.of(pictures, sr.texts_of(prompts[:1] * 2, *words_of(a, 0)))[0].value().tolist()
        if one == other or not math.isfinite(one + other):
            raise UserError(f"--reward {label}: gives two different pictures the scores {one:g} and {other:g}; give a "
                            "file that is whole")
        for flag, words in (("--control", a.control), ("--neg", a.neg)):
            for word in words if weight else ():
                if part.does_not_know(word):
                    world.say(f"{flag} {word}: the tokenizer of --reward {label} does not know it, and reads single "
                              "letters; what that rewards is unsure, so look at the pictures, or give another word")


class Texts(NamedTuple):
    """The prompts that a run reads from files."""
    training: list  # None: the captions of --images
    watched: list   # while training
    held_out: list  # evaluated before and after
    own: list = ()  # the watched ones that are held out from training (--watch-prompts own)


def texts_of(a):
    """The `Texts` of the flags. Raises UserError."""
    training = None
    own = []
    if a.images is None:
        training = prompt_files.read_prompts(a.prompts)
        if a.watch_prompts == recipe.OWN:
            own, training = draws.hold_out(training, a.watch)
    evaluated = []
    if a.eval or len(own) < a.watch:
        evaluated = prompt_files.read_prompts(a.eval_prompts, "--eval-prompts")
    watched = own + evaluated
    if a.watch_prompts not in (None, recipe.OWN):
        watched = prompt_files.read_prompts(a.watch_prompts, "--watch-prompts")
    return Texts(training, watched[:a.watch], evaluated[:a.eval or 0], own)


def photographs_of(a, model, world, texts):
    """(the `Texts`, the `Photograph`s that are watched and not trained on, those to train on) of --images. Raises
    UserError."""
    photos = photographs.read(a.images, a.size, model.unit, world)
    world.say(f"--images: {len(photos)} photographs: {photographs.by_shape(photos, model.unit)}")
    if a.watch_prompts != recipe.OWN:
        return texts, [], photos
    shown, photos = draws.hold_out(photos, a.watch)
    own = [photograph.caption for photograph in shown]
    return texts._replace(watched=(own + texts.watched)[:a.watch], own=own), shown, photos


def titles_of(a, texts):
    """The watched prompts as the run's pages show them. If some are the user's own, the others are marked."""
    if a.watch_prompts != recipe.OWN:
        return texts.watched
    own = len(texts.own)
    return texts.watched[:own] + [f"{prompt} (of --eval-prompts)" for prompt in texts.watched[own:]]


def tell_held_out(a, texts, world):
    """Say how many of the user's own prompts or photographs are held out (--watch-prompts own)."""
    if a.watch_prompts != recipe.OWN:
        return
    what = "--prompts" if a.images is None else "--images"
    others = len(texts.watched) - len(texts.own)
    world.say(f"--watch-prompts own: {len(texts.own)} of {what} are watched and not trained on"
              + (f", a tenth at most; the first {others} of --eval-prompts are watched too, and the pages mark them"
                 if others else ""))


def contents_of(texts, places, reward):
    """The `Contents` of what a run reads: texts {what: texts} and places {what: files or folders}, with every reward of
    the `Rewards`."""
    for number, (part, weight) in enumerate(reward.parts.values(), 1):
        texts[f"the weight of part {number} of --reward"] = [str(weight)]
        places[f"part {number} of --reward"] = list(part.path) if isinstance(part.path, tuple) else [part.path]
    return Contents(texts, places)


def make_ready(a, net, reward, curriculum, held_out, processes):
    """Apply the machine's flags to the loaded networks. Returns the optimizer."""
    checkpointing = a.checkpointing and net.device.type == "cuda"
    net.branches_are_one_call = modes.branches_are_one_call(a.memory, processes, checkpointing)
    if checkpointing:
        net.transformer.enable_gradient_checkpointing()
    if a.rollout_dtype == "fp8":
        float8.enable(net.transformer, keeps=a.memory in modes.HELD_ON_THE_GPU)
    if a.compile:
        for block in parallel.blocks_of(net.transformer):
            block.compile(recompile_limit=VARIANTS)
    if modes.is_lean(a.memory):
        # On a small card the decoder is recomputed in the backward. Every text is encoded now, so that the rewards'
        # text towers can move to the host. Their image towers compute in the network's dtype.
        net.vae.enable_gradient_checkpointing()
        asked = {step: [curriculum.prompts[row] for row in rows] for step, rows in curriculum.rows.items()}
        for step, prompts in (asked | {0: held_out}).items():
            # A held-out reward scores only the watched and evaluated pictures.
            for part, _ in reward.trained if step else reward.parts.values():
                if prompts:
                    part.read(sr.texts_of(prompts, *words_of(a, step)))
        for part, _ in reward.parts.values():
            part.compact(net.dtype)
    parameters = layouts.trainable(net.transformer)
    return adamw.optimizer_of(parameters, a.lr, a.weight_decay, a.memory, net.device)


def words_of(a, step):
    """The wanted and the unwanted words of an update. Step 0: the words that score watched and evaluated pictures."""
    return a.control[step % len(a.control)], a.neg[step % len(a.neg)]
