"""Times one update, phase by phase.

    python -m experiments.bench --model miniature                      on a laptop
    torchrun --nproc_per_node=8 -m experiments.bench --random-init     FLUX.1-dev's size

It takes the flags of train.py and runs train.py's code. With --random-init nothing is downloaded. --released times the
same work also with the habits of the released code's loop, which are added one after another.
"""

import sys
from statistics import median

import open_clip
import torch

import command
import flow
import prepare
import recipe
import srpo_reward as sr
import train
from engine.command_line import Parser, some_path, whole
from engine.data import draws
from engine.errors import UserError, frame
from engine.files import must_be_new, write_json
from engine.memory import counts, layouts, modes, parallel, plan, work
from engine.model import float8, tensors
from engine.model.tensor_files import kind_of, meta_network
from rewards import clip_model

PHASES = ["rollout", "branches", "optimizer"]
HABITS = ["one image at a time", "text features four times", "VAE not frozen", "anomaly detection"]


def flags(argv):
    """(this script's own flags, those of train.py, the `Model`) of a command line. Raises UserError for a wrong flag,
    and for flags of train.py that make no sense here."""
    parser = Parser(__doc__)
    parser.add_argument("--random-init", action="store_true",
                        help="random weights: --model gives the size, and the reward is a ViT-H/14")
    parser.add_argument("--released", action="store_true", help="compare with the released loop's habits")
    parser.add_argument("--json", type=some_path, help="file that the numbers are written to, which is not there yet")
    parser.add_argument("--repeats", type=whole(1), default=5, help="timed updates, after one untimed update")
    own, others = parser.parse_known_args(argv)
    a, model = command.read(others)
    if own.json:
        must_be_new(own.json, "--json")
    for name in ("plan", "explain", "resume", "overwrite", "tensorboard", "out", "weights", "images"):
        if getattr(a, name):
            raise UserError(f"--{name}: an update is timed here, and nothing else; leave it out")
    return own, a, model


# --------------------------------------------------------------------------------------------- random weights
def random_flow(model, world, own, layout):
    """A `flow.Flow` with a model's size and random weights. own: the `parallel.World` whose processes share the
    transformer; layout: a `layouts.Layout`. Without both, each process has all of it, in the dtype that it computes
    in."""
    transformer = meta_network(kind_of(model.configs.transformer), model.configs.transformer)
    if layout is None:
        transformer.to(world.dtype).to_empty(device=world.device)
    else:
        transformer.to_empty(device=layout.prepare(transformer, own))
    fill_at_random(transformer, world.device)
    if layout is not None:
        layout.start(transformer)
    with world.device:
        vae = counts.create(model.configs.vae, world.dtype).eval().requires_grad_(False)
    scheduler = {"use_dynamic_shifting": False, "shift": 3.0}
    return flow.family_of(model)(transformer, vae, scheduler, world.device, world.dtype)


def fill_at_random(transformer, device):
    """Fill the weights with random numbers of standard deviation 0.02, and the norms' gains with 1. The numbers are
    made on `device`: a GPU is faster, even for parameters that stay on the host."""
    scales = float8.scales_of(transformer)
    for name, parameter in tensors.own_parameters(transformer).items():
        if "norm_" in name and parameter.ndim == 1:  # the gains of RMSNorm
            tensors.fill(parameter, torch.ones(parameter.shape))
        else:
            local = tensors.local_part(parameter)
            tensors.put(parameter, 0.02 * torch.randn(local.shape, device=device), scales.get(name))


def random_reward(world):
    """`Rewards` of one network with HPSv2.1's size and random weights."""
    with clip_model.quiet(), world.device:
        clip = open_clip.create_model(clip_model.ARCH, load_weights=False, device=world.device)
    reward = clip_model.ClipReward(clip, open_clip.get_tokenizer(clip_model.ARCH))
    return sr.Rewards({"random": (reward, 1.0)})


def random_embeddings(net, prompts, text_tokens):
    """Random `Embeddings` of P prompts: txt [P, L, D], pooled [P, D']. text_tokens: L."""
    config = net.transformer.config
    txt = torch.randn(len(prompts), text_tokens, config.joint_attention_dim)
    pooled = torch.randn(len(prompts), config.get("pooled_projection_dim", 0))
    return flow.Embeddings(txt, pooled, truncated=0)


def random_run(a, model, world):
    """The `prepare.Run` of prepare.set_up, but with random weights and without watched pictures."""
    flow.needs_gpu(model)
    torch.manual_seed(0)
    share = prepare.share_of(a, world.size)
    prompts = [f"prompt {i}" for i in range(a.global_batch)]
    group = recipe.METHODS[a.method].group(a)
    curriculum = draws.Curriculum(prompts, a.steps, a.global_batch, world.rows(share.images), a.seed, group)
    net = random_flow(model, world, world, layouts.Layout(a.lora, a.memory, a.seed))
    embeddings = random_embeddings(net, curriculum.prompts, model.configs.text_tokens)
    net.guide(a.cfg, (embeddings.txt[0], embeddings.pooled[0]), a.cfg_gradient, a.cfg_keep_norm)
    reward = random_reward(world)
    optimizer = prepare.make_ready(a, net, reward, curriculum, [], world.size)
    return prepare.Run(world, model, net, reward, recipe.METHODS[a.method].load(), share, prepare.job(a, model),
                       curriculum, embeddings, None, optimizer, net.grid(a.size, a.size))


# ------------------------------------------------------------------------------------------------- one update
def one_by_one(batch):
    """Yields a `prepare.Batch` of B images as B batches of one image."""
    for row in range(len(batch.prompts)):
        own = slice(row, row + 1)
        c = flow.Condition(batch.c.txt[own], batch.c.pooled[own], batch.c.grid)
        yield batch._replace(
            prompts=batch.prompts[own], c=c, start=batch.start[own], eps=batch.eps[own],
            texts=sr.Texts(*(side[own] for side in batch.texts)), middles=[m[own] for m in batch.middles])


def read_again(reward, texts):
    """Compute the text features of `srpo_reward.Texts` again, twice."""
    for _ in range(2):
        for part, _ in reward.parts.values():
            part.cache.clear()
            part.read(texts)


def batches_of(a, run, habits, step):
    """Yields the batches of an update, with some of HABITS."""
    for whole_batch in run.batches(a, step):
        for batch in one_by_one(whole_batch) if "one image at a time" in habits else [whole_batch]:
            if "text features four times" in habits:
                read_again(run.reward, batch.texts)
            yield batch


def one_update(a, run, habits, step=1):
    """One update by `train.update`, with some of HABITS. Returns {phase: seconds}."""
    run.net.vae.requires_grad_("VAE not frozen" in habits)
    with torch.autograd.set_detect_anomaly("anomaly detection" in habits):
        told = train.update(a, run, step, batches_of(a, run, habits, step))
    return {"rollout": told["seconds_rollout"], "branches": told["seconds_update"] - told["seconds_optimizer"],
            "optimizer": told["seconds_optimizer"]}


# ------------------------------------------------------------------------------------------------- the report
def report(a, run, rungs, measured):
    """Print a line of medians for each rung. rungs: lists of habits. measured: for each rung a list of
    {phase: seconds}."""
    device = run.world.device
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, one thread"
    print(f"{card}, {run.world.size} process(es), --method {a.method}, an update of {a.global_batch} images, "
          f"{run.share.batch} at a time, {a.size} x {a.size}, {a.rollout_steps} rollout steps, median of "
          f"{len(measured[0])}\n")
    print(f"{'':46}{'rollout':>9}{'branches':>10}{'optimizer':>10}{'total':>9}{'ratio':>7}")
    totals = []
    for habits, updates in zip(rungs, measured, strict=True):
        totals.append(median(sum(update.values()) for update in updates))
        line = f"+ {habits[-1]}" if habits else "this project"
        line = f"{line:46}"
        for phase in PHASES:
            line += f"{median(update[phase] for update in updates):>9.3f} "
        print(line + f"{totals[-1]:>8.3f} {totals[-1] / totals[0]:>6.2f}")
    reached = work.achieved(work.update_flop(run.job, run.world.size), totals[0], device)
    print("\n" + ", ".join(f"{name} {value}" for name, value in reached.items()))


def numbers(run, first, updates):
    """The measured numbers, and the plan's prediction of them: a dict. first, updates: {phase: seconds} of the untimed
    update, and of the timed ones."""
    device = run.world.device
    phases = {phase: median(update[phase] for update in updates) for phase in PHASES}
    seconds = sum(phases.values())
    planned = plan.predict(run.job, run.world.size, torch.bfloat16)
    told = {"phases": phases, "seconds": seconds, "first": sum(first.values()), "images": run.job.images,
            "planned": max(planned.peak_in_update, planned.peak_in_rollout) / plan.GIB}
    told |= work.achieved(work.update_flop(run.job, run.world.size), seconds, device)
    if device.type == "cuda":
        told |= {"allocated": torch.cuda.max_memory_allocated() / plan.GIB,
                 "reserved": torch.cuda.max_memory_reserved() / plan.GIB}
    return told


def main():
    with frame("bench"):
        own, a, model = flags(sys.argv[1:])
        a.steps = 1  # every timed update is the first one
        world = parallel.World(a.replicas, mesh=modes.needs_mesh(a.memory))
        prepare.settle(a, model, world)
        run = random_run(a, model, world) if own.random_init else prepare.set_up(a, model, world)
        rungs = [[]]
        if own.released:
            rungs = [HABITS[:n] for n in range(len(HABITS) + 1)]
        measured = [[] for _ in rungs]
        for repeat in range(own.repeats + 1):
            # The rungs take turns. If the machine gets slower, it does so for all of them.
            for habits, updates in zip(rungs, measured, strict=True):
                seconds = one_update(a, run, habits)
                if repeat > 0:
                    updates.append(seconds)
                elif not habits:
                    first = seconds
        if world.main:
            report(a, run, rungs, measured)
            if own.json:
                write_json(own.json, numbers(run, first, measured[0]))
        world.close()


if __name__ == "__main__":
    main()
