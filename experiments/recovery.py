"""Fig. 3: the picture that is recovered from a noisy one.

    python -m experiments.recovery

It compares one step of the network alone with Direct-Align, which removes the known noise.
"""

import torch
from matplotlib import pyplot

import command
import direct_align as da
import flow
from engine.data.prompt_files import read_prompts
from engine.errors import frame
from engine.model.folder import Model
from experiments import pages, runs
from experiments.pages import Spread, shown

SIGMAS = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5)  # 5 to 50 % of the way from noise to the picture
WEIGHTS = (0.075, 0.025)  # weights of the network's term in Eq. 5: sigma - sigma_to
SHOWN = 2  # number of prompts in the figure


@torch.no_grad()
def recovered(net, x0, eps, c, guidance):
    """{row: pictures [sigmas, B, 3, H, W]}: x_t, and the picture that each way recovers from it, at every noise level.

    x0, eps: [B, tokens, channels]. c: the prompts' `Condition`."""
    ways = {"one step of the network": None} | {f"Direct-Align, weight {w}": w for w in WEIGHTS}
    found = {"x_t": [], **{name: [] for name in ways}}
    for sigma in SIGMAS:
        x_t = da.inject(x0, eps, sigma)
        v = net.velocity(x_t, sigma, c, guidance)
        found["x_t"].append(net.decode(x_t, c.grid))
        for name, weight in ways.items():
            sigma_to = 0.0 if weight is None else sigma - weight
            found[name].append(net.decode(da.recover(x_t, v, eps, sigma, sigma_to), c.grid))
    return {name: torch.stack(pictures) for name, pictures in found.items()}


def main(argv=None):
    with frame("recovery"):
        own = runs.parse(runs.parser(__doc__, seeds=1), argv)
        a = command.flags(["--model", own.model])
        prompts = read_prompts(a.eval_prompts)[:min(own.pictures, 64)]
        net = flow.load(Model(own.model))
        grid = net.grid(a.size, a.size)
        embeddings = flow.encode_prompts(Model(own.model), prompts)
        net.guide(a.cfg, embeddings.empty)
        c = embeddings.condition(slice(None), grid, "cpu")
        start = flow.noise(net, grid, range(len(prompts)))
        x0 = net.rollout(start, c, da.sigma_steps(a.eval_steps, net.shift(start.shape[1], a.eval_steps)), a.guidance)
        eps = flow.noise(net, grid, range(10**6, 10**6 + len(prompts)))
        with torch.no_grad():
            truth = net.decode(x0, grid)
        pictures = recovered(net, x0, eps, c, a.guidance)
        errors = {}
        for name, found in pictures.items():
            if name != "x_t":
                error = (found - truth).square().mean((2, 3, 4)).sqrt()  # [sigmas, B]
                errors[name] = {}
                for sigma, row in zip(SIGMAS, error, strict=True):
                    se = row.std().item() / len(row) ** 0.5
                    errors[name][str(sigma)] = Spread(row.mean().item(), se, 1, len(row))
        columns = {str(s): (f"sigma {s}", ".3f") for s in SIGMAS}
        told = ("Root mean square error of the pictures, with values from 0 to 1, against the clean ones. "
                f"{len(prompts)} held-out prompts; ± is the standard error over them.")
        alone = errors["one step of the network"]["0.9"]
        ours = errors[f"Direct-Align, weight {WEIGHTS[1]}"]["0.9"]
        result = pages.verdict(ours.mean + 2 * ours.error < alone.mean - 2 * alone.error,
                               f"at sigma 0.9 the error is {shown(alone, '.3f')} in one step of the network, "
                               f"{shown(ours, '.3f')} with the known noise removed (weight {WEIGHTS[1]}).")
        claim = "Direct-Align recovers the picture at any noise level (Fig. 3)."
        page = pages.Page("What is recovered (Fig. 3)", claim, result, told, [(errors, columns)])
        pages.write(own, "recovery", page, strip(pictures, truth))


def strip(pictures, truth):
    """A figure of the first prompts' pictures: a row for each way, a column for each noise level, the clean pictures
    last."""
    rows = list(pictures)
    figure, axes = pyplot.subplots(len(rows), len(SIGMAS) + 1, figsize=(13, 3.4), layout="constrained")
    for y, name in enumerate(rows):
        shown = [*pictures[name], truth]
        for x, images in enumerate(shown):
            side_by_side = torch.cat(list(images[:SHOWN]), -1)  # [3, H, SHOWN W]
            axes[y, x].imshow(side_by_side.permute(1, 2, 0).numpy(), interpolation="nearest")
            axes[y, x].set_xticks([])
            axes[y, x].set_yticks([])
            if y == 0:
                axes[y, x].set_title(f"sigma {SIGMAS[x]}" if x < len(SIGMAS) else "clean", fontsize=9)
        axes[y, 0].set_ylabel(name.replace(", ", ",\n").replace(" of ", "\nof "), fontsize=8)
    return figure


if __name__ == "__main__":
    main()
