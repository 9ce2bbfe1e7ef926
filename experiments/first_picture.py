"""The README's first picture, with a column for each of eight prompts.

    python -m experiments.first_picture --weights runs/miniature/weights

The rows: the base; the base, with every prompt prefixed with "realistic photo"; SRPO; true photos of the same scenes.
"""

import torch
from matplotlib import pyplot

import command
import flow
from engine.command_line import Parser, some_path
from engine.data.prompt_files import read_prompts
from engine.errors import frame, printable
from engine.files import PNG_MARK, check_outputs
from engine.model.folder import Model
from experiments import pages
from miniature import world

COLUMNS = 8
SEED = 70_000_000  # of the true photos


def sampled(net, model, prompts, a):
    """A network's pictures of P prompts, at noise seeds 0, 1, ...: [P, 3, H, W] in [0, 1]."""
    embeddings = flow.encode_prompts(Model(model), prompts)
    net.guide(a.cfg, embeddings.empty)
    grid = net.grid(a.size, a.size)
    start = flow.noise(net, grid, range(len(prompts)))
    return flow.sample(net, embeddings.txt, embeddings.pooled, start, grid, a.eval_steps, a.guidance)


def true_photos(prompts):
    """Drawn photos of the scenes of P prompts: [P, 3, 64, 64]."""
    scenes = [world.parse(prompt) for prompt in prompts]
    kind = torch.tensor([kind for kind, _ in scenes])
    layout = torch.tensor([layout for _, layout in scenes])
    images, _ = world.draw(world.scenes_of, len(prompts), SEED, kind, layout, "realistic photo")
    return images


def draw(rows, path):
    """Write {label: pictures [COLUMNS, 3, H, W]} as one picture, with a labelled row for each entry."""
    figure, axes = pyplot.subplots(len(rows), COLUMNS, figsize=(1.2 * COLUMNS + 1.6, 1.2 * len(rows)),
                                   layout="constrained")
    for (label, images), line in zip(rows.items(), axes, strict=True):
        for image, axis in zip(images, line, strict=True):
            axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=11)
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    pages.save(figure, path, metadata={"Software": "SRPO"})  # PNG_MARK


def main(argv=None):
    with frame("first_picture"):
        parser = Parser(__doc__)
        parser.add_argument("--model", default="miniature", help="the miniature's folder")
        parser.add_argument("--weights", type=some_path, required=True, help="folder of weights, from train.py")
        parser.add_argument("--out", type=some_path, default="assets/first.png", help="file of the picture")
        own = parser.parse_args(argv)
        check_outputs([(own.out, PNG_MARK, "this script's picture")], [], overwrite=True)
        a = command.flags(["--model", own.model])
        prompts = read_prompts(a.eval_prompts)[:COLUMNS]
        words = [f"realistic photo. {prompt}" for prompt in prompts]
        base = flow.load(Model(own.model))
        aligned = flow.load(Model(own.model), own.weights)
        draw({"base": sampled(base, own.model, prompts, a),
              'base, prompt\nprefixed with\n"realistic\nphoto"': sampled(base, own.model, words, a),
              "SRPO": sampled(aligned, own.model, prompts, a),
              "true photos": true_photos(prompts)}, own.out)
        print(printable(own.out))


if __name__ == "__main__":
    main()
