"""The rows of the miniature's model card that need no training: python -m experiments.card

It measures how much texture the VAE keeps, the angles between the reward's directions, and the size of its bias. It
also measures how often the judge is right, and the Frechet distance and the diversity of rendered pictures.
"""

import torch
import torch.nn.functional as F
from torchvision.transforms.functional import to_pil_image

import flow
from engine.command_line import Parser
from engine.data.prompt_files import read_prompts
from engine.errors import frame
from engine.model.folder import Model
from evaluation.metrics import diversity, frechet
from evaluation.metrics.look import load_look
from evaluation.watch import measure
from miniature import world
from miniature.judge import load_judge
from rewards import load_rewards
from rewards.pictures import pixel_statistics

N = 1024  # pictures for a row
PHOTO = "realistic photo"
CG = "CG render"
CAST = (0.12, -0.06, -0.06)  # the red cast: what is added to R, G and B
CHANGES = {"a red cast": lambda x: x + torch.tensor(CAST).view(1, 3, 1, 1),
           "blur": lambda x: F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1),
           "half of the saturation": lambda x: torch.lerp(x, world.luma(x)[:, None], 0.5)}
TOLD = {"reward": "a red cast", "reward_unbiased": "a red cast", "reward_cyan": "a red cast", "reward_smooth": "blur",
        "reward_saturation": "half of the saturation"}
BLIND = ("reward_saturation",)  # rewards that read no text
SEED = 60_000_000  # of the rendered pictures
BORDER = ((0.6, 0.65), (0.65, 0.7), (0.7, 0.75), (0.75, 0.8))  # looks u beside world.PHOTO_U
PER_PROMPT = 4  # pictures of a prompt for the diversity, as in table1


@torch.no_grad()
def textures(model):
    """(the mean texture of rendered photos, the same after encoding and decoding by the VAE)."""
    vae = flow.load(Model(model)).vae
    photos, _ = world.draw(world.sample_style, N, 8, PHOTO, True)
    again = []
    for part in photos.split(64):
        latents = vae.encode(2 * part - 1).latent_dist.mean
        again.append((vae.decode(latents).sample / 2 + 0.5).clamp(0, 1))
    before = pixel_statistics(photos)["texture"].mean().item()
    return before, pixel_statistics(torch.cat(again))["texture"].mean().item()


def largest_cosine(folder, prompts):
    """The largest |cosine| between the directions of two axes in a reward's text features. A direction is the mean
    difference between the axis's two words."""
    part, _ = next(iter(load_rewards(folder).parts.values()))
    apart = []
    for _, low, high in world.WORDS:
        _, C1, C2 = part.conditions(prompts, high, low)
        apart.append((C1 - C2).mean(0))
    apart = F.normalize(torch.stack(apart), dim=-1)
    return (apart @ apart.T - torch.eye(3)).abs().max().item()


def worth(folder, change):
    """How much one of CHANGES changes a reward's mean score of pictures in their usual looks."""
    images, scenes = world.draw(world.sample_style, 256, 5, "", True)
    changed = CHANGES[change](images).clamp(0, 1)
    reward = load_rewards(folder)
    scores = [measure(x, world.captions(scenes), reward, None, PHOTO, CG)["reward"] for x in (images, changed)]
    return (scores[1] - scores[0]).mean().item()


def judged(model):
    """{row: share of right answers} of the judge, for rendered pictures in every look."""
    judge = load_judge(model)
    images, scenes = world.draw(world.sample_labelled, 4 * N, 99, True)
    answers = [judge.verdicts(part, prompts) for part, prompts in
               zip(images.split(256), batches(world.captions(scenes), 256), strict=True)]
    verdict = {name: torch.cat([answer[name] for answer in answers]) for name in answers[0]}
    unseen = world.held_out(scenes.kind, scenes.layout)
    found = {"judge: content, pairs that the base has seen": verdict["alignment"][~unseen].mean().item(),
             "judge: content, pairs that are held out": verdict["alignment"][unseen].mean().item()}
    for name, axis, border in (("realism", world.PHOTO, world.PHOTO_U),
                               ("painting", world.BRUSH, world.PAINTING_U)):
        right = verdict[name].bool() == (scenes.look[:, axis] > border)
        found[f"judge: {name}"] = right.float().mean().item()
    found["judge: whole pictures called broken"] = verdict["broken"].mean().item()
    u = scenes.look[:, world.PHOTO]
    second = torch.cat([load_look(model).verdicts(part)["realism_2"] for part in images.split(256)])
    for name, photo in (("judge", verdict["realism"]), ("second judge", second)):
        for low, high in BORDER:
            found[f"{name}: called a photo, of pictures with u from {low} to {high}"] = \
                photo[(u >= low) & (u < high)].mean().item()
    return found


def batches(items, size):
    """A list in parts of `size` items."""
    return [items[i:i + size] for i in range(0, len(items), size)]


def true_pictures(prompts, style):
    """Rendered pictures of P prompts, in one style: [P, 3, 64, 64]."""
    scenes = [world.parse(prompt) for prompt in prompts]
    kind = torch.tensor([kind for kind, _ in scenes])
    layout = torch.tensor([layout for _, layout in scenes])
    images, _ = world.draw(world.scenes_of, len(prompts), SEED, kind, layout, style)
    return images


def from_truth(prompts, style):
    """The Frechet distance of rendered pictures of the prompts, in one style, from other rendered photos of them."""
    return frechet.of_pictures(true_pictures(prompts, style), prompts)["frechet"]["mean"]


def true_diversity(folder, prompts, style):
    """The diversity of rendered pictures of a prompt, in one style and a reward's features. table1 has the same number
    for models."""
    texts = [prompt for prompt in prompts[:diversity.PROMPTS] for _ in range(PER_PROMPT)]
    pictures = [to_pil_image(image) for image in true_pictures(texts, style)]
    return diversity.Scorer(load_rewards(folder).trained)(pictures, texts)["diversity"].mean().item()


def main(argv=None):
    with frame("card"):
        parser = Parser(__doc__)
        parser.add_argument("--model", default="miniature", help="the miniature's folder")
        own = parser.parse_args(argv)
        prompts = read_prompts(f"{own.model}/prompts_eval.txt")
        true, through = textures(own.model)
        rows = {"texture of true photos": f"{true:.4f}",
                "texture of true photos through the VAE": f"{through:.4f}, {through / true:.0%}"}
        for name, change in TOLD.items():
            folder = f"{own.model}/{name}"
            if name not in BLIND:
                rows[f"{name}: largest cosine between two axes' words"] = f"{largest_cosine(folder, prompts):.3f}"
            rows[f"{name}: what {change} adds"] = f"{worth(folder, change):+.3f}"
        rows |= {name: f"{share:.1%}" for name, share in judged(own.model).items()}
        rows["Frechet distance of true photos from others"] = f"{from_truth(prompts, PHOTO):.1f}"
        rows["Frechet distance of true CG renders"] = f"{from_truth(prompts, CG):.1f}"
        reward = f"{own.model}/reward"
        rows["diversity of true photos of a prompt"] = f"{true_diversity(reward, prompts, PHOTO):.4f}"
        rows["diversity of true CG renders of a prompt"] = f"{true_diversity(reward, prompts, CG):.4f}"
        print("| | |\n|---|---|")
        for name, value in rows.items():
            print(f"| {name} | {value} |")


if __name__ == "__main__":
    main()
