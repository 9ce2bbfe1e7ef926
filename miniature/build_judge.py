"""The miniature's judge, trained with the renderer's truth."""

import torch
import torch.nn.functional as F
from tqdm import tqdm

from flow import pack
from miniature import world
from miniature.build_flow import GRID, latents, network
from miniature.build_scorers import augment
from miniature.build_vae import build_vae, draw_pictures, to_bytes
from miniature.fitting import SEED
from miniature.judge import FEATURES, Judge, features_of

JUDGE_STEPS = 2600


def damage(net, z):
    """Broken pictures, with damaged parts, from packed latents z [B, 16, 64]: [B, 3, 64, 64]. The kinds of damage are a
    blend of two scenes, noise in the latents, patches of two scenes, and clipped colour."""
    b = len(z)
    other = z.roll(1, 0)
    mix = 0.35 + 0.3 * torch.rand(b, 1, 1)
    ghost = mix * z + (1 - mix) * other
    noisy = z + (0.7 + 0.6 * torch.rand(b, 1, 1)) * torch.randn_like(z)
    patchwork = torch.where(torch.rand(b, 16, 1) < 0.5, z, other)
    flooded = z * (1.8 + torch.rand(b, 1, 1))
    kind = torch.randint(4, (b,))
    ruined = torch.stack([ghost, noisy, patchwork, flooded])[kind, torch.arange(b)]  # [B, 16, 64]
    return net.decode(ruined, GRID)


@torch.no_grad()
def draw_evidence(vae, batches):
    """The judge's training data: 256 * batches labelled pictures of its own, with all pairs among them.

    The first third is added twice more: as "seen" after the VAE, and as "broken" after `damage`. All are uint8.
    """
    data = draw_pictures(batches, 40_000_000, True)
    net = network(None, vae)
    shift, scale = vae.config.shift_factor, vae.config.scaling_factor
    torch.manual_seed(SEED)
    seen = []
    broken = []
    first = data["images"][:-(-len(data["images"]) // 3)]
    for part in tqdm(first.split(64), desc="judge pictures"):
        z = pack((vae.encode(part.float() / 127.5 - 1).latent_dist.mean - shift) * scale)
        seen.append(to_bytes(net.decode(z, GRID)))
        broken.append(to_bytes(damage(net, z)))
    return data | {"seen": torch.cat(seen), "broken": torch.cat(broken)}


def build_judge(shop):
    """Train the `Judge` with the renderer's truth, on raw pictures, on pictures after the VAE and on damaged ones."""
    vae = build_vae(shop)
    latents(shop, vae)  # sets the VAE's shift and scaling factor
    data = shop.kept("evidence", draw_evidence, vae, shop.amount(64))
    images = data.pop("images")
    seen = data.pop("seen")
    broken = data.pop("broken")
    scenes = world.Scenes(**data)
    torch.manual_seed(SEED + 1)
    judge = Judge()

    def loss_of(step):
        drawn = torch.randint(len(images), (32,))
        decoded = torch.randint(len(seen), (64,))
        ruined = torch.randint(len(broken), (32,))
        x = torch.cat([images[drawn], seen[decoded], broken[ruined]]).float() / 255
        out = judge(augment(x))
        whole = {name: logits[:96] for name, logits in out.items()}
        is_broken = torch.cat([torch.zeros(96), torch.ones(32)])
        broken_loss = F.binary_cross_entropy_with_logits(out["broken"], is_broken)
        return broken_loss + judge_loss(whole, scenes[torch.cat([drawn, decoded])])

    shop.fit("judge", {"judge": judge}, loss_of, steps=JUDGE_STEPS, lr=1.5e-3)
    return judge


def judge_loss(out, truth):
    """The sum of cross-entropies of the judge's logits `out` for undamaged pictures with the `Scenes` `truth`. Looks
    near the border of realism or painting do not count."""
    loss = F.cross_entropy(out["layout"], truth.layout)
    pair = truth.layout > 0
    for slot, there in (("first", torch.ones_like(pair)), ("second", pair)):
        kinds = truth.kind[there, 0 if slot == "first" else 1]
        for feature, answer in zip(FEATURES, features_of(kinds), strict=True):
            loss = loss + F.cross_entropy(out[f"{slot} {feature}"][there], answer)
    for name, axis, border in (("realism", world.PHOTO, world.PHOTO_U),
                               ("painting", world.BRUSH, world.PAINTING_U)):
        value = truth.look[:, axis]
        clear = (value - border).abs() > 0.03
        loss = loss + F.binary_cross_entropy_with_logits(out[name][clear], (value > border).float()[clear])
    return loss
