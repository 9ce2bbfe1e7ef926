"""`train.py --explain`: one update in words and pictures, in the order of the equations.

Each step is printed with its equation, symbols, shapes and ranges. The explanation listens to the terms that
`train.srpo` yields. Its texts are the functions' own docstrings, once each.
"""

import inspect
from io import BytesIO
from textwrap import fill

import torch
from matplotlib.figure import Figure

import direct_align as da
import srpo_reward as sr
from engine.errors import printable
from engine.files import PNG_MARK, write_whole

PICTURES = 2  # number of prompts that are drawn


def shown(value):
    """A value as text: a tensor as its shape and range, a long list as its first entry and length."""
    if torch.is_tensor(value):
        low, high = value.min().item(), value.max().item()
        span = f"{low:.4g} .. {high:.4g}" if low != high else f"{low:.4g}"
        gradient = "  with gradient" if value.requires_grad else ""
        return f"{str(list(value.shape)):16}{span}{gradient}"
    if isinstance(value, list) and len(value) > 3:
        return f"[{value[0]!r}, ...] ({len(value)})"
    return str(value)


# How much of the network's error v_theta - (eps - x0) is in x0_hat, by --recover.
FACTORS = {"velocity": "(sigma_to - sigma) / (1 - sigma_to)", "epsilon": "sigma_to - sigma"}


def factor_of(term, recover):
    """The number of FACTORS, [B], of a `Term`."""
    step = term.sigma_to - term.sigma
    return step / (1 - term.sigma_to) if recover == "velocity" else step


def rows_of(function, name):
    """(the heads, the row of `name`) of the table in a function's docstring."""
    lines = [line.strip() for line in inspect.getdoc(function).splitlines()]
    return next(line for line in lines if line.startswith("form ")), next(
        (line for line in lines if line.startswith(f"{name} ")), f"{name}: has no row in this table")


class Explanation:
    """A listener of `train.update` that prints one update, batch by batch and term by term, and draws it."""

    def __init__(self, a, run):
        """a: the flags. run: a `prepare.Run` of one process."""
        self.a = a
        self.run = run
        self.net = run.net
        self.rows = []
        self.told = set()  # functions whose docstring is printed
        self.batch = None
        self.rolled_out = False

    def tell(self, function, **values):
        """Print a function's name, the first paragraph of its docstring (the first time only), and the values around
        its call."""
        arguments = [word for word in inspect.signature(function).parameters if word != "self"]
        print(f"\n{function.__module__}.{function.__qualname__}({', '.join(arguments)})")
        if function not in self.told:
            print("    " + inspect.getdoc(function).split("\n\n")[0].replace("\n", "\n    "))
            self.told.add(function)
        for symbol, value in values.items():
            print(f"      {symbol:10} {shown(value)}")

    def begin(self, batch):
        """Called with each batch, before its terms."""
        self.batch = batch
        self.rolled_out = False
        self.tell(sr.texts_of, p0=batch.texts.p0, p1=batch.texts.p1, p2=batch.texts.p2)

    def before(self, term):
        """Called with each term, before its backward. The gradient of the image is kept, to be drawn."""
        term.image.retain_grad()

    def after(self, loss, term):
        """Called with each term of Eq. 6's sum and its loss, after the backward."""
        a = self.a
        if not self.rolled_out:
            if self.batch.x0 is None:
                self.tell(type(self.net).rollout, start=self.batch.start, guidance=a.rollout_guidance, x0=term.x0)
            else:
                self.tell(type(self.net).encode, x0=term.x0)
            self.tell(da.training_grid, sigma_max=a.sigma_range[0], sigma_min=a.sigma_range[1], cells=a.cells)
            self.rolled_out = True
        print(f"\n{'-' * 30} the branch: {term.branch} {'-' * 30}")
        self.tell(da.place, sigma=term.sigma, sigma_to=term.sigma_to)
        self.tell(da.inject, x0=term.x0, eps=self.batch.eps, x_t=term.x_t)
        self.tell(type(self.net).velocity, guidance=a.guidance, v_theta=term.v_theta)
        self.tell(da.recover if a.recover == "velocity" else da.recover_epsilon, x0_hat=term.x0_hat)
        self.tell_sign(term)
        self.tell(type(self.net).decode, image=term.image)
        self.tell(sr.Rewards.of, **self.scores_of(term))
        self.tell(da.discount, d=term.d)
        self.tell(sr.branch_reward, form=a.form, branch=term.branch, r=term.reward)
        head, row = rows_of(sr.branch_reward, a.form)
        print(f"      this form in both branches: r1 and r2 change places, or the sign does\n      {head}\n      {row}")
        self.tell(sr.loss, threshold=a.threshold)
        self.tell(da.lam, early=a.lam[0], late=a.lam[1])
        self.tell(da.aggregate, loss=loss)
        self.remember(term)

    @torch.no_grad()
    def scores_of(self, term):
        """{"r0", "r1", "r2": [B]} of a term's image."""
        of = self.run.reward.of(term.image.detach(), self.batch.texts)
        return {f"r{n}": r.value() for n, r in enumerate(of)}

    def tell_sign(self, term):
        """Print how much of the network's error is in x0_hat, and with which sign."""
        factor = factor_of(term, self.a.recover)
        print(f"      x0_hat = x0 + factor (v_theta - (eps - x0)),  factor = {FACTORS[self.a.recover]}")
        print(f"      factor     {shown(factor)}: {'below' if factor.max() < 0 else 'above'} 0 in this branch")

    @torch.no_grad()
    def remember(self, term):
        """Keep a row for `draw` for each prompt of the term: {title: picture [H, W, 3]}."""
        grid = self.batch.c.grid
        sigma = da.column(term.sigma, term.x_t)
        one_step = term.x_t - sigma * term.v_theta.detach()  # the prediction of an ordinary sampler
        wanted = -term.image.grad                            # less loss is more reward
        strength = wanted.abs().flatten(1).quantile(0.99, 1).clamp(min=1e-12).view(-1, 1, 1, 1)
        factor = factor_of(term, self.a.recover)
        # One step alone, x0 - sigma error, is too strong. The inverting branch adds the error the other way.
        side = ":\nsame sign as in one step" if term.branch == "denoise" else ":\nthe other sign, so pale"
        equation = "Eq. 12" if term.branch == "denoise" else "Eq. 13"
        panels = {
            "clean image $x_0$": self.net.decode(term.x0, grid),
            "Eq. 3: $x_t$, known noise\nin it, $\\sigma$ = {sigma:.3f}": self.net.decode(term.x_t, grid),
            "one-step prediction\n$x_t - \\sigma v_\\theta$, from $\\sigma$ = {sigma:.3f}":
                self.net.decode(one_step, grid),
            f"Eq. 5, {equation} ({term.branch}): $\\hat x_0$,\n"
            "$\\sigma$ = {sigma:.3f} to {sigma_to:.3f}\n"
            "{factor:+.3f} of the network's error" + side: term.image.detach(),
            "Eq. 6: what the reward asks\nof each pixel (grey: nothing)": 0.5 + 0.5 * wanted / strength}
        for i, prompt in enumerate(self.batch.prompts):
            row = {}
            for title, images in panels.items():
                filled = title.replace("{sigma:.3f}", f"{term.sigma[i]:.3f}")
                filled = filled.replace("{sigma_to:.3f}", f"{term.sigma_to[i]:.3f}")
                filled = filled.replace("{factor:+.3f}", f"{factor[i]:+.3f}")
                row[filled] = images[i].float().clamp(0, 1).permute(1, 2, 0).cpu().numpy()  # [H, W, 3]
            self.rows.append((prompt, row))

    def draw(self, path):
        """Write the picture to `path`: a row for each prompt and branch, columns in the order of the equations."""
        prompts = list(dict.fromkeys(prompt for prompt, _ in self.rows))[:PICTURES]
        rows = [(prompt, row) for wanted in prompts for prompt, row in self.rows if prompt == wanted]
        figure = Figure(figsize=(13, 2.95 * len(rows)), layout="constrained")
        axes = figure.subplots(len(rows), 5, squeeze=False)
        for (prompt, row), line in zip(rows, axes, strict=True):
            line[0].set_ylabel(fill(prompt, 30), fontsize=9)
            for (title, picture), axis in zip(row.items(), line, strict=True):
                axis.imshow(picture, interpolation="nearest")
                axis.set_title(title, fontsize=9)
                axis.set_xticks([])
                axis.set_yticks([])
        buffer = BytesIO()
        keyword, ours = PNG_MARK.decode().split("\0")
        figure.savefig(buffer, format="png", dpi=90, metadata={keyword: ours})
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, buffer.getvalue())
        print(printable(f"the same as a picture: {path}"))

    def close(self, told, path):
        """Called after the update, with the numbers of its log line, {name: number}: prints the end, and draws."""
        clipped = f"clipped to {self.a.clip}" if told["grad_norm"] > self.a.clip else f"below --clip {self.a.clip}"
        print(f"\ngradient norm {told['grad_norm']:.4g}, {clipped}; then a step of AdamW with lr "
              f"{self.a.lr}. Nothing is kept.")
        self.draw(path)
