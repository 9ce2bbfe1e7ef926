"""All that an update of train.py needs, read, encoded and loaded; and the batch that it begins with."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

import baselines
import direct_align as da
import flux
import rewards
import srpo_reward as sr
from engine import cache, cards, data, memory, parallel, photographs, plan
from engine.cache import Cache
from engine.contents import Contents
from evaluation import watch


class Batch(NamedTuple):
    """What an update begins with, for B images."""
    prompts: list          # B texts
    c: flux.Condition      # the same, as the network reads them
    x0: torch.Tensor       # clean latents [B, N, C], or None: the model's own, to be rolled out
    start: torch.Tensor    # [B, N, C] the noise that a rollout begins with
    eps: torch.Tensor      # [B, N, C] the noise prior that is injected
    C0: torch.Tensor       # [B, D] text features of the prompts
    C1: torch.Tensor       # [B, D] the same, of "<control>. <prompt>"
    C2: torch.Tensor       # [B, D] the same, of "<neg>. <prompt>"
    middles: list          # --injections draws m [B] of where in the training grid the branches meet
    chance: data.Chance = None  # for what else a method draws


@dataclass
class Run:
    """All that the loop needs beside the flags."""
    world: parallel.World
    net: flux.Flux
    reward: sr.Rewards
    curriculum: data.Curriculum
    embeddings: flux.Embeddings
    watched: watch.Watch
    optimizer: torch.optim.Optimizer
    grid: tuple            # (rows, columns) of tokens of a picture
    contents: Contents = None  # of what was read, to be compared when the run is resumed

    def batch(self, a, step, part):
        """The part-th of the --accumulate batches of an update, a `Batch`."""
        device = self.net.device
        first = (self.world.rank * a.accumulate + part) * a.batch
        images = a.batch * a.accumulate * self.world.size
        chance = data.Chance(a.seed, step, images, slice(first, first + a.batch))
        rows = self.curriculum.rows[step][part * a.batch:(part + 1) * a.batch]
        texts = [self.curriculum.prompts[row] for row in rows]
        grid = self.curriculum.grid(step) or self.grid
        x0 = self.curriculum.latents(rows)
        shape = (grid[0] * grid[1], self.net.transformer.config.in_channels)
        of_its_own = a.noise == "independent" or x0 is not None
        start = chance.normal(*shape) if of_its_own else chance.normal_shared(*shape)
        eps = chance.normal_shared(*shape) if a.noise == "fresh" else start
        middles = []
        for _ in range(a.injections):
            middles.append(da.draw_middle(images, a.cells, chance.generator)[chance.mine])
        x0 = None if x0 is None else x0.to(device)
        C0, C1, C2 = self.reward.conditions(texts, *words_of(a, step))  # [B, D] each
        return Batch(texts, self.embeddings.condition(rows, grid, device), x0, start.to(device),
                     eps.to(device), C0, C1, C2, middles, chance)


def job(a):
    """What the plan needs to know of a run."""
    configs = flux.configs(a.model)
    rows, columns = flux.token_grid(configs.vae, a.size, a.size)
    calls = calls_of(a)
    return plan.Job(
        model=a.model, transformer=configs.transformer, vae=configs.vae, text_tokens=configs.text_tokens,
        size=a.size, image_tokens=rows * columns, batch=a.batch,
        accumulate=a.accumulate, rollout_steps=calls.without, calls=calls.with_gradient,
        checkpointing=a.checkpointing, replicas=a.replicas,
        reward_networks=partial(rewards.image_networks, a.reward), lora=a.lora,
        memory=a.memory)


def calls_of(a):
    """How often an update calls the network for an image."""
    if a.method != "srpo":
        return baselines.calls(a)
    return baselines.Calls(a.rollout_steps if a.images is None else 0, a.injections * len(a.branches))


def settle(a, world):
    """Decide --memory auto, and say why. Raises UserError, with the command that would do, if nothing
    fits."""
    a.memory, why = world.decide(cards.settle, job(a), world)
    if why:
        world.say(why)


def set_up(a, world, stopping=None):
    """Read, encode and load everything: a `Run`. Nothing is written but to the cache. Raises UserError."""
    flux.needs_gpu(a.model)
    flux.check_weights(a.model, a.weights, a.lora)
    curriculum = curriculum_of(a, world)
    evaluated = data.read_prompts(a.eval_prompts, "--eval-prompts")
    held_out = evaluated[:a.eval]
    chosen_by = data.read_prompts(a.watch_prompts, "--watch-prompts") if a.watch_prompts else evaluated
    chosen_by = chosen_by[:a.watch]
    both = curriculum.prompts + chosen_by + held_out
    kept = Cache(cache.folder_of(a.cache, flux.is_full_size(a.model)))
    embeddings = flux.encode_prompts(a.model, both, world.device, world.dtype, kept)
    if embeddings.truncated:
        world.say(f"{embeddings.truncated} of {len(both)} prompts are longer than the text encoder takes, "
                  "and are truncated")
    reward = rewards.load_rewards(a.reward, world.device)
    layout = memory.Layout(a.lora, a.memory, a.seed)
    net = flux.load(a.model, a.weights, world.device, world.dtype, world, layout)
    if a.images is not None:
        made_by = flux.of_vae(a.model, world.device, world.dtype, kept)
        curriculum.encode(net.encode, made_by, kept, world)
    optimizer = make_ready(a, net, reward, curriculum, chosen_by + held_out)
    first = len(curriculum.prompts)
    last = first + len(chosen_by)
    watched = watch.Watch(a, world, net, reward, watch.Prompts(chosen_by, embeddings.part(first, last)),
                          watch.Prompts(held_out, embeddings.part(last, len(both))), stopping)
    texts = curriculum.texts | {"--watch-prompts": chosen_by, "--eval-prompts": held_out}
    places = curriculum.places | {"--model": flux.files_of(a.model, a.weights)}
    if a.weights:
        places["--weights"] = [a.weights]
    for number, part in enumerate(rewards.parse_rewards(a.reward), 1):
        texts[f"the weight of reward {number}"] = [str(part.weight)]
        places[f"reward {number}"] = [rewards.fetch(part.name, part.where)]
    return Run(world, net, reward, curriculum, embeddings, watched, optimizer, net.grid(a.size, a.size),
               Contents(texts, places))


def curriculum_of(a, world):
    """What this process learns from, in its order: prompts or, with --images, photographs. Raises
    UserError."""
    mine = a.batch * a.accumulate  # images of an update that this process makes
    order = (a.steps, mine * world.size, world.rows(mine), a.seed)
    if a.images is None:
        group = a.group if a.method == "dancegrpo" else 1
        return data.Curriculum(data.read_prompts(a.prompts), *order, group)
    unit = flux.pixels_per_token(flux.configs(a.model).vae)
    return photographs.Album(photographs.read(a.images, a.size, unit, world), unit, *order)


def make_ready(a, net, reward, curriculum, held_out):
    """What the machine's flags ask for, on networks that are loaded. Returns the optimizer."""
    if a.checkpointing and net.device.type == "cuda":
        net.transformer.enable_gradient_checkpointing()
    if a.compile:
        for block in parallel.blocks_of(net.transformer):
            block.compile()
    if memory.is_lean(a.memory):
        # A small card saves here too: the decoder is recomputed in the backward; every text is encoded now,
        # so that the rewards' text sides can leave the card, and their image sides compute as the network.
        net.vae.enable_gradient_checkpointing()
        for step, rows in curriculum.rows.items():
            reward.conditions([curriculum.prompts[row] for row in rows], *words_of(a, step))
        for part, _ in reward.parts.values():
            if held_out:
                part.conditions(held_out, *words_of(a, 0))
            part.keep_image_side(net.dtype)
    parameters = memory.trainable(net.transformer)
    return memory.optimizer_of(parameters, a.lr, a.weight_decay, a.memory, net.device)


def words_of(a, step):
    """The wanted and the unwanted words of an update; those of step 0 are what held-out pictures are scored
    with."""
    return a.control[step % len(a.control)], a.neg[step % len(a.neg)]
