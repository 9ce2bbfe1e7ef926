"""What experiments.gpu measures beside updates. WHAT is one of these: python -m experiments.on_a_card WHAT FILE

    sampling     seconds and memory of a picture of a model with random weights; takes the flags of sample.py
    gradient     the gradient of an update of the miniature and its mean reward, to FILE.safetensors
    numerics     the gradient on the GPU, in bf16, against that in float32 on the CPU
    determinism  the same gradient twice
"""

import os
import subprocess
import sys
import tempfile

import torch
from safetensors.torch import load_file, save_file

import command
import flow
import prepare
import sample
from engine.command_line import Parser, sides, some_path
from engine.errors import frame
from engine.files import must_be_new, write_json
from engine.memory import layouts, modes, parallel, sampling
from engine.model import tensors
from experiments import bench

STEPS = 8  # of a sampled picture
GIB = 2**30


def sampled(argv):
    """A picture of STEPS steps, after an untimed one. Returns the seconds of a picture of --eval-steps, and GiB."""
    args, model = command.of_script(sample.flags(), argv)
    world = parallel.World(mesh=modes.needs_mesh(args.memory))
    args.memory, _ = sampling.settle(sampling.job(model, args.size, 1), args.memory, world)
    net = bench.random_flow(model, world, *sampling.how(args.memory, None, model, world))
    grid = net.grid(*sides(args.size))
    prompt = bench.random_embeddings(net, ["a prompt"], model.configs.text_tokens)

    def picture(steps):
        began = parallel.mark(net.device)
        # random weights give numbers that are not finite, and the picture is not used
        c = flow.Condition(prompt.txt.to(net.device), prompt.pooled.to(net.device), grid)
        levels = torch.linspace(1, 0, steps + 1)
        with torch.no_grad():
            net.decode(net.rollout(flow.noise(net, grid, [0]), c, levels, args.guidance), grid)
        return parallel.seconds_between(began, parallel.mark(net.device))

    picture(1)
    net.rollouts = []
    whole = picture(STEPS)
    steps = sum(parallel.seconds_between(*marks) for marks in net.rollouts)
    return {"seconds": args.eval_steps * steps / STEPS + whole - steps} | memory(net.device)


def memory(device):
    """GiB at their peak, on a GPU."""
    if device.type != "cuda":
        return {}
    return {"allocated": torch.cuda.max_memory_allocated() / GIB, "reserved": torch.cuda.max_memory_reserved() / GIB}


def gradient_of(argv):
    """({name: the gradient of an update, on the CPU}, the mean reward)."""
    a, model = command.read(["--model", "miniature", "--eval", "0", *argv])
    a.steps = 1
    world = parallel.World(mesh=modes.needs_mesh(a.memory))
    prepare.settle(a, model, world)
    run = prepare.set_up(a, model, world)
    rewards = []
    for batch in run.batches(a, 1):
        for loss, term in run.losses(a, run.net, run.reward, batch):
            (loss / run.share.accumulate).backward()
            rewards.append(term.reward.detach().mean())
    found = {}
    for name, parameter in run.net.transformer.named_parameters():
        if parameter in set(layouts.trainable(run.net.transformer)):
            found[name] = tensors.full(parameter.grad).float().cpu()
    world.close()
    return found, torch.stack(rewards).mean().cpu()


def compared(one, other):
    """How near two gradients are: their cosine, and their largest difference as a share of the largest number."""
    a, b = (torch.cat([each[name].flatten().double() for name in sorted(each)]) for each in (one, other))
    return {"cosine": torch.cosine_similarity(a, b, dim=0).item(),
            "largest": ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()}


def numerics(argv):
    """The gradient here against that on the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        on_the_cpu = f"{folder}/gradient"
        subprocess.run([sys.executable, "-m", "experiments.on_a_card", "gradient", on_the_cpu, *argv], check=True,
                       env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
        theirs = load_file(f"{on_the_cpu}.safetensors")
    ours, reward = gradient_of(argv)
    other = theirs.pop("reward").item()
    return compared(ours, theirs) | {"reward": reward.item(), "reward on the CPU": other}


def determinism(argv):
    """The same gradient twice."""
    (one, _), (two, _) = gradient_of(argv), gradient_of(argv)
    return compared(one, two) | {"the same bits": float(all(torch.equal(one[name], two[name]) for name in one))}


def main(argv=None):
    with frame("on_a_card"):
        parser = Parser(__doc__)
        parser.add_argument("what", choices=("sampling", "gradient", "numerics", "determinism"))
        parser.add_argument("file", type=some_path, help="is not there yet")
        own, others = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
        of_gradient = f"{own.file}.safetensors"
        must_be_new(of_gradient if own.what == "gradient" else own.file, "FILE")
        if own.what == "gradient":
            found, reward = gradient_of(others)
            save_file(found | {"reward": reward.reshape(1)}, of_gradient)
            return
        if own.what == "sampling":
            told = sampled(others)
        elif own.what == "numerics":
            told = numerics(others)
        else:
            told = determinism(others)
        write_json(own.file, told)


if __name__ == "__main__":
    main()
