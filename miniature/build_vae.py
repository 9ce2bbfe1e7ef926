"""The pictures of the drawn world that the miniature's networks learn from, and its VAE."""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn
from tqdm import tqdm

from miniature import world
from miniature.fitting import SEED

CROP_STEPS = 4100  # the first of VAE_STEPS, which train on crops
VAE_STEPS = 4500


def to_bytes(images):
    """Pictures in [0, 1] as uint8."""
    return (images * 255).round().byte()


def draw_pictures(batches, seed, *arguments):
    """N = 256 * batches pictures in every look: {"images": uint8 [N, 3, 64, 64], and the fields of their `Scenes`}.
    arguments: for world.sample_labelled."""
    images = []
    scenes = []
    for i in tqdm(range(batches), desc="pictures"):
        drawn, truth = world.draw(world.sample_labelled, 256, seed + i, *arguments)
        images.append(to_bytes(drawn))
        scenes.append(truth)
    return {"images": torch.cat(images), **joined(scenes)}


def joined(scenes):
    """A list of `Scenes`, joined: the dict of the joined fields."""
    return {field: torch.cat([getattr(part, field) for part in scenes])
            for field in ("kind", "layout", "look", "said")}


def labelled_pictures(shop):
    """(uint8 pictures [N, 3, 64, 64], their `Scenes`) in every look, for the VAE and the reward. They are drawn once
    and kept on disk. None shows a held-out pair."""
    data = shop.kept("labelled", draw_pictures, shop.amount(96), 20_000_000)
    return data.pop("images"), world.Scenes(**data)


def new_vae():
    """FLUX's VAE at a smaller width: 8 x 8 pixels for each latent, 16 latent channels, no quant convolutions, no middle
    attention.

    At first its convolutions are orthogonal and its residual blocks add nothing. This learns ten times faster than
    diffusers' initial weights.
    """
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[12, 24, 48, 64], layers_per_block=1, latent_channels=16, norm_num_groups=4,
        sample_size=world.SIZE, use_quant_conv=False, use_post_quant_conv=False,
        mid_block_add_attention=False)
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.bias)
            if name.endswith("conv2"):  # the last convolution of a residual block
                nn.init.zeros_(module.weight)
            else:
                nn.init.orthogonal_(module.weight)
    nn.init.constant_(vae.encoder.conv_out.bias[16:], -4)  # the latents' log variance
    return vae


def residue(x):
    """The luma of pictures x [B, 3, H, W] minus its 3 x 3 mean, [B, 1, H, W]: grain and edges."""
    luma = world.luma(x)[:, None]
    return luma - F.avg_pool2d(F.pad(luma, (1, 1, 1, 1), mode="replicate"), 3, stride=1)


def texture_loss(recovered, x):
    """A loss that keeps the grain, which a mean square alone would smooth away. It compares the residues, and their
    strength in each field of 8 x 8 pixels. recovered, x: pictures [B, 3, H, W] in [-1, 1]."""
    theirs = residue(recovered)
    truth = residue(x)
    strength = F.avg_pool2d(theirs.abs(), 8) - F.avg_pool2d(truth.abs(), 8)
    return 3 * F.mse_loss(theirs, truth) + strength.abs().mean()


def crops(images):
    """A random field of 32 x 32 pixels, the same in all pictures [B, 3, 64, 64]. Its edges lie between latents."""
    top, left = (8 * torch.randint(5, (2,))).tolist()
    return images[..., top:top + 32, left:left + 32]


def build_vae(shop):
    """Train the VAE to reproduce rendered pictures, with a weak prior on the latents (KL weight 1e-4). It trains on
    crops first, which cost a quarter, and then on whole pictures. Returns the VAE."""
    images, _ = labelled_pictures(shop)
    torch.manual_seed(SEED)
    vae = new_vae()

    def loss_of(step):
        x = images[torch.randint(len(images), (16,))].float() / 127.5 - 1  # [16, 3, 64, 64]
        if step < shop.amount(CROP_STEPS):
            x = crops(x)
        posterior = vae.encode(x).latent_dist
        recovered = vae.decode(posterior.sample()).sample
        latents = posterior.mean[0].numel()
        pixels = F.mse_loss(recovered, x) + 0.1 * F.l1_loss(recovered, x)
        return pixels + texture_loss(recovered, x) + 1e-4 * posterior.kl().mean() / latents

    shop.fit("vae", {"vae": vae}, loss_of, steps=VAE_STEPS, lr=2e-3)
    return vae
