# %% [markdown]
# # The paper, equation by equation
#
# *Directly Aligning the Full Diffusion Trajectory with Fine-Grained Human Preference*
# ([arXiv 2509.06942](https://arxiv.org/abs/2509.06942)), Eqs. 3 to 13 in order.
# Every equation is called from this project's files. Nothing is copied here.
#
# It runs on a CPU in under five minutes, with the miniature: a FLUX.1 of 2.4 million parameters that draws shapes.
# Start it in the project's folder, after `pip install -r requirements.txt`. In Colab, clone the project and `%cd` into
# it first. It is made from `docs/walkthrough.py` by `python docs/notebook.py`.

# %%
import tempfile
from pathlib import Path
from textwrap import fill

import matplotlib.pyplot as plt
import torch

import command
import direct_align as da
import flow
import prepare
import srpo_reward as sr
import train
from engine.data.prompt_files import read_prompts
from engine.files import read_json
from engine.memory import parallel
from evaluation.report.curves import read_log
from miniature import world
from rewards import load_rewards


def show(rows, titles=None, size=1.5):
    """Draw rows {name: pictures [P, 3, H, W] in [0, 1]}, one picture beside the other."""
    columns = len(next(iter(rows.values())))
    figure, axes = plt.subplots(len(rows), columns, figsize=(size * columns + 1, size * len(rows)),
                                squeeze=False, layout="constrained")
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(name, fontsize=8)
        for axis, picture in zip(line, pictures, strict=True):
            axis.imshow(picture.detach().clamp(0, 1).permute(1, 2, 0), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
    for axis, title in zip(axes[0], titles or [], strict=False):
        axis.set_title(fill(title, 22), fontsize=8)


torch.set_num_threads(1)
a, model = command.read(["--model", "miniature"])
net = flow.load(model)
reward = load_rewards(a.reward)
prompts = read_prompts(a.eval_prompts)[:4]
c = flow.encode_prompts(model, prompts).condition(slice(None), net.grid(a.size, a.size), "cpu")
print(*prompts, sep="\n")

# %% [markdown]
# ## A clean image
#
# The rollout: from pure noise at sigma 1 to a clean latent `x0` at sigma 0, without a gradient. FLUX predicts a
# velocity, v = eps - x0, and a step from sigma to sigma' adds (sigma' - sigma) v.

# %%
start = flow.noise(net, c.grid, range(len(prompts)))
sigmas = da.sigma_steps(a.eval_steps, net.shift(start.shape[1], a.eval_steps))
x0 = net.rollout(start, c, sigmas, a.guidance)
clean = net.decode(x0, c.grid)
show({"x0, decoded": clean}, prompts)

# %% [markdown]
# ## Eq. 3: noise goes in
#
# $$x_t = \alpha_t x_0 + \sigma_t \epsilon$$
#
# For a rectified flow, alpha = 1 - sigma. The noise `eps` is drawn once and known from now on.

# %%
eps = flow.noise(net, c.grid, range(100, 100 + len(prompts)))
levels = (0.25, 0.5, 0.75, 0.95)
noisy = {sigma: da.inject(x0, eps, sigma) for sigma in levels}
show({"x_t of the first prompt": torch.cat([net.decode(x_t[:1], c.grid) for x_t in noisy.values()])},
     [f"sigma {sigma}" for sigma in levels])

# %% [markdown]
# ## Eq. 4: the same noise comes out
#
# $$x_0 = \frac{x_t - \sigma_t \epsilon}{\alpha_t}$$
#
# No network is needed, and the result is exact at every noise level.

# %%
for sigma, x_t in noisy.items():
    error = (da.recover_exact(x_t, eps, sigma) - x0).abs().max().item()
    print(f"sigma {sigma}: largest error of x0 {error:.1e}")

# %% [markdown]
# ## Eq. 5: one step of the network, and the known noise for the rest
#
# $$\hat x_0 = \frac{x_t - \Delta\sigma_t \epsilon_\theta(x_t, t, c) - (\sigma_t - \Delta\sigma_t) \epsilon}
# {\alpha_t}$$
#
# The network goes a small part of the way, Delta sigma. The known noise gives the rest. This is the one call that has
# a gradient. FLUX predicts a velocity, and then `da.recover` is the form that is exact for a perfect network.
#
# Below: 5, 25 and 50 % of the way from noise to the picture. One step of the network alone gets colours and edges
# wrong. With the known noise taken out, the shapes are right at 5 %, and at 25 % the picture is nearly the clean one.
# So a reward can judge it.

# %%
way = {"5 %": 0.95, "25 %": 0.75, "50 %": 0.5}
alone, aligned = [], []
with torch.no_grad():
    for sigma in way.values():
        x_t = da.inject(x0, eps, sigma)
        v_theta = net.velocity(x_t, sigma, c, a.guidance)
        alone.append(net.decode(da.recover(x_t, v_theta, eps, sigma, 0.0), c.grid)[:1])
        aligned.append(net.decode(da.recover(x_t, v_theta, eps, sigma, sigma - 0.075), c.grid)[:1])
show({"the network alone": torch.cat([*alone, clean[:1]]),
      "Eq. 5, Delta sigma .075": torch.cat([*aligned, clean[:1]])}, [*way, "clean"])

# %% [markdown]
# ## Eq. 6: lambda(t)
#
# $$r(x_t) = \lambda(t) \sum_{i=1}^{n} r(\hat x_0^{(i)})$$
#
# Late steps, with little noise, are where rewards are hacked. So lambda(t) makes them count less. The sum is never
# built: each term is differentiated as it comes, and the gradients add up. The paper gives no numbers for lambda; 1 to
# 0.4 is ours. The released code weighs one text instead (D2 in docs/ledger.md).

# %%
grid = da.training_grid(*a.sigma_range, a.cells)
fig, axis = plt.subplots(figsize=(5, 2.2), layout="constrained")
axis.plot(grid, da.lam(grid, *a.sigma_range, 1.0, 0.4), label="lambda(t), 1 to 0.4")
axis.plot(grid, 1 + da.discount(torch.arange(a.cells).flip(0), *a.discount_denoise, a.cells),
          label="released: 1 + d, the weight of the wanted text")
axis.set_xlabel("sigma of the call")
axis.invert_xaxis()
axis.legend(fontsize=8)
plt.show()

# %% [markdown]
# ## Eqs. 7 and 8: the reward of a picture and a text
#
# $$r = RM(x, p) = f_{img}(x)^T f_{txt}(p)$$
#
# This reward is a cosine, as HPSv2.1 is. Eq. 7 has the bare prompt, r0. Eq. 8, "semantic guided", has a control word
# before it, r1 of "realistic photo. ...". `reward.of` gives r0, r1 and r2 of pictures; `value()` computes one.
# The pictures here are drawn by the miniature's renderer, so their look is known: the same scenes as CG renders and as
# photos.

# %%
scenes = [world.parse(prompt) for prompt in prompts]
kind, layout = (torch.tensor(part) for part in zip(*scenes, strict=True))
drawn = {look: world.draw(world.scenes_of, len(prompts), 0, kind, layout, look)[0]
         for look in ("CG render", "realistic photo")}
show(drawn)
texts = sr.texts_of(prompts, a.control[0], a.neg[0])
for look, pictures in drawn.items():
    r0, r1, r2 = reward.of(pictures, texts)
    print(f"{look:16} Eq. 7, r0: {r0.value().mean():+.3f}    Eq. 8, r1: {r1.value().mean():+.3f}")

# %% [markdown]
# ## Eqs. 9 and 10: semantic-relative preference
#
# $$r_{SRP} = RM(x, p_1) - RM(x, p_2) = f_{img}(x)^T (C_1 - C_2)$$
#
# The wanted text minus the unwanted text, r1 - r2. Eq. 10 is for a reward that is a dot product. A reward whose text
# attends to the picture has Eq. 9 alone; the last lines are of such a one. What the reward likes whatever the text
# says is in both r1 and r2, and cancels. The last row of each has a red cast. The first reward likes red, so Eq. 7
# rises. The difference falls, because a red cast is not what a photo looks like.

# %%
red = (drawn["realistic photo"] + torch.tensor([0.12, -0.06, -0.06]).view(1, 3, 1, 1)).clamp(0, 1)
for look, pictures in (drawn | {"photo, red cast": red}).items():
    r0, r1, r2 = reward.of(pictures, texts)
    print(f"{look:16} r0: {r0.value().mean():+.3f}    r1: {r1.value().mean():+.3f}    "
          f"r1 - r2: {sr.relative(r1, r2).value().mean():+.3f}")
attending = load_rewards("imagereward=miniature/reward_cross")
for look, pictures in (drawn | {"photo, red cast": red}).items():
    r0, r1, r2 = attending.of(pictures, texts)
    print(f"text attends to the picture: {look:16} r1 - r2: {sr.relative(r1, r2).value().mean():+.3f}")

# %% [markdown]
# ## Eq. 11: the form like classifier-free guidance
#
# $$r = (1 - k) r_2 + k r_1$$
#
# The paper writes it for a dot product, with C in the place of r. At k = 1 it is Eq. 8. Above 1 it pushes away from the
# unwanted text. The released code has (1 + d) r1 - r2 with a small d that changes along the trajectory.

# %%
r0, r1, r2 = reward.of(drawn["realistic photo"], texts)
for k in (1.0, 1.5, 3.0):
    print(f"k = {k}: {sr.relative_cfg(r1, r2, k).value().mean():+.3f}")
print(f"released, d = 0.1: {sr.relative_released(r1, r2, 0.1).value().mean():+.3f}")

# %% [markdown]
# ## Eqs. 12 and 13: two branches, and the sign that flips
#
# $$\text{denoise: } \hat x_0 \text{ from a step down,} \qquad \text{invert: } \hat x_0 \text{ from a step up}$$
#
# Put Eq. 3 into `da.recover`:
#
# $$\hat x_0 = x_0 + \frac{\sigma' - \sigma}{1 - \sigma'} \left(v_\theta - (\epsilon - x_0)\right)$$
#
# sigma' - sigma is negative when denoising and positive when inverting. So the network's part has opposite signs in the
# two branches. Both land on the same level here.

# %%
reach = da.reach_of(a.groundtruth_ratio, a.cells)
middle = torch.full((len(prompts),), a.cells // 2)
gradients = {}
for branch in ("denoise", "invert"):
    at = da.place(branch, middle, grid, reach, a.meet)
    x_t = da.inject(x0, eps, at.sigma)
    v_theta = net.velocity(x_t, at.sigma, c, a.guidance).detach().requires_grad_()
    image = net.decode(da.recover(x_t, v_theta, eps, at.sigma, at.sigma_to), c.grid)
    r0, r1, r2 = reward.of(image, texts)
    gradients[branch], = torch.autograd.grad(sr.relative(r1, r2).value().sum(), v_theta)
    factor = (at.sigma_to - at.sigma) / (1 - at.sigma_to)
    print(f"{branch:8} sigma {at.sigma[0]:.4f} to {at.sigma_to[0]:.4f}: factor {factor[0]:+.4f}")
cosine = torch.cosine_similarity(gradients["denoise"].flatten(), gradients["invert"].flatten(), 0).item()
print(f"cosine of the two gradients of the same reward in v_theta: {cosine:+.3f}")

# %%
figure, axes = plt.subplots(2, len(prompts), figsize=(7, 3.6), layout="constrained")
for line, (branch, gradient) in zip(axes, gradients.items(), strict=True):
    latents = flow.unpack(gradient, c.grid).mean(1)  # [B, h, w]
    line[0].set_ylabel(branch)
    for axis, picture in zip(line, latents, strict=True):
        limit = picture.abs().max()
        axis.imshow(picture, cmap="RdBu", vmin=-limit, vmax=limit)
        axis.set_xticks([])
        axis.set_yticks([])
figure.suptitle("the gradient of r1 - r2 in v_theta, mean over the channels: red and blue change places",
                fontsize=9)
plt.show()

# %% [markdown]
# A reward that is raised in the inverting branch is lowered for the sampler. So the wanted and the unwanted text change
# places there. This is the table of `sr.branch_reward`, in which every form does that.

# %%
print(sr.branch_reward.__doc__.split("\n\n")[1])

# %% [markdown]
# ## Why two branches: common mode
#
# One update climbs a r1 - b r2, summed over the branches. Split it:
#
# $$a r_1 - b r_2 = \frac{a - b}{2} (r_1 + r_2) + \frac{a + b}{2} (r_1 - r_2)$$
#
# The first part is the common mode: what both texts share, and with it every bias of the image tower, such as red. The
# second part is what the words say. Eq. 11 has common mode in one branch (a = 1.5, b = 0.5), and none in both (2, 2).
# Eq. 10 never has any. The points are runs of five seeds ([page](experiments/results/common_mode.md)).

# %%
measured, = read_json("experiments/results/common_mode.json")["tables"]
figure, axis = plt.subplots(figsize=(6, 2.8), layout="constrained")
for name, row in measured.items():
    if row["predicted"]:
        axis.plot(row["predicted"]["mean"], row["redness"]["mean"], "o" if "both" in name else "s", label=name)
axis.axhline(measured["base"]["redness"]["mean"], color="grey", linestyle="dashed", label="base")
axis.set_xlabel("common mode (a - b) / (a + b), predicted")
axis.set_ylabel("redness, measured")
axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# ## One update
#
# `train.srpo` puts all of it together, and `train.update` steps the optimizer.

# %%
a, model = command.read(["--model", "miniature"])
machine = parallel.World()
prepare.settle(a, model, machine)
line = train.update(a, prepare.set_up(a, model, machine), 1)
{name: round(value, 4) for name, value in line.items() if not name.startswith(("seconds", "images"))}

# %% [markdown]
# ## A run, and where it ends
#
# The released loss is a hinge, relu(0.7 - r). It stops the gradient of a picture whose reward is above 0.7, and no
# relative reward of this network is. Without a hinge the relative reward has no end: a run that goes on passes every
# photograph, and its pictures break.
# `--land 0.25` ends the run where the watched pictures surely have the SGP gap r1 - r2 of photographs. Near it, the
# learning rate falls.
# On a model whose photographs' gap is unknown, `--land FOLDER` measures it from a folder of them.

# %%
out = Path(tempfile.mkdtemp()) / "run"
train.main(["--model", "miniature", "--watch", "16", "--watch-every", "2", "--steps", "60", "--land", "0.25", "--eval",
            "64", "--out", str(out)])

# %%
looks = [line for line in read_log(out / "log.jsonl") if "watch" in line]
figure, axis = plt.subplots(figsize=(5, 2.4), layout="constrained")
axis.plot([line["step"] for line in looks], [line["watch"]["sgp"] for line in looks], "o-", label="watched pictures")
axis.axhline(0.25, color="grey", linestyle="dashed", label="--land")
axis.set_xlabel("update")
axis.set_ylabel("SGP gap")
axis.legend(fontsize=8)
plt.show()

# %%
figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
axis.imshow(plt.imread(out / "before_after.png"))
axis.set_title("before, and after", fontsize=9)
axis.axis("off")
plt.show()
