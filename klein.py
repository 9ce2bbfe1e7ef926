"""What only FLUX.2-klein has: the call of its network, its latents, its time shift, its text encoder.

It differs from FLUX.1 (flux.py) in five ways. There is no pooled text. In place of a guidance embedding there is
classifier-free guidance. Text tokens have positions too. The latents are normalised by statistics that the VAE holds.
The time shift depends on the number of steps. Shapes as in flow.py.
"""

import math

import diffusers
import torch
import transformers

from engine.model import configs
from engine.model.flux2 import layers_read
from engine.model.text import embedding, tokenizer_of
from flow import Flow, pack, positions, unpack

FEW, MANY = 10, 200        # steps for which the two lines of mu were fitted
OF_FEW = (8.73809524e-05, 1.89833333)   # slope and offset of mu in the image tokens
OF_MANY = (0.00016927, 0.45666666)
OF_MANY_ABOVE = 4300       # above this number of tokens mu is that of MANY steps


def empirical_mu(n_tokens, steps):
    """mu of FLUX.2's time shift exp(mu), for N image tokens and a number of Euler steps (diffusers'
    compute_empirical_mu): two lines in N, one for 10 steps and one for 200, and a line in the steps between them."""
    of_few = OF_FEW[0] * n_tokens + OF_FEW[1]
    of_many = OF_MANY[0] * n_tokens + OF_MANY[1]
    if n_tokens > OF_MANY_ABOVE:
        return of_many
    return of_many + (of_few - of_many) * (MANY - steps) / (MANY - FEW)


class Klein(Flow):
    """The two networks of FLUX.2-klein: a Flux2Transformer2DModel and an AutoencoderKLFlux2."""

    def time_embedding(self):
        """The module that is called with 1000 sigma alone."""
        return self.transformer.time_guidance_embed.time_proj

    def shift(self, n_tokens, steps):
        """The model's own time shift, exp(mu), as Flux2KleinPipeline samples. It depends on the number of steps, unless
        the scheduler has a fixed shift."""
        if not self.scheduler.get("use_dynamic_shifting"):
            return self.scheduler.get("shift", 1.0)
        return math.exp(empirical_mu(n_tokens, steps))

    def predict(self, x_t, sigma, c, guidance):
        """One call of the network: the velocity [B, N, C] float32. Arguments as in `Flow.velocity`; guidance is not
        read, since the model has no embedding for it."""
        sigma = self.numbers(sigma, len(x_t))
        self.exact_times.scales = [sigma]
        return self.transformer(
            hidden_states=x_t.to(self.dtype), timestep=sigma, guidance=None,
            encoder_hidden_states=c.txt.to(self.dtype), img_ids=positions(c.grid, 4, self.device),
            txt_ids=text_positions(c.txt.shape[1], self.device), return_dict=False)[0].float()

    def statistics(self):
        """(mean, standard deviation) [C] float32 of the channels of a token, from the VAE's batch norm."""
        norm = self.vae.bn
        return norm.running_mean.float(), (norm.running_var.float() + self.vae.config.batch_norm_eps).sqrt()

    def decode(self, x, grid):
        """Packed latents [B, N, C] -> images [B, 3, H, W] in [0, 1], with gradient."""
        mean, std = self.statistics()
        z = unpack(x * std + mean, grid)
        return (self.vae.decode(z.to(self.vae.dtype)).sample.float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode(self, images):
        """Images [B, 3, H, W] in [0, 1] -> packed latents [B, N, C] float32, without gradient: the mean of what the
        VAE's encoder gives, normalised. The inverse of `decode`."""
        mean, std = self.statistics()
        images = (2 * images - 1).to(self.device, self.vae.dtype)
        return (pack(self.vae.encode(images).latent_dist.mode().float()) - mean) / std

    @staticmethod
    def text_encoders(model, dtype):
        """A Flux2KleinPipeline with only the text encoder of a `Model` and its tokenizer. Raises UserError."""
        qwen = configs.strict(transformers.Qwen3ForCausalLM, model.part("text_encoder"), dtype, use_safetensors=True,
                              checked=True)
        tokenizer = tokenizer_of(transformers.Qwen2TokenizerFast, model.part("tokenizer"), qwen)
        return diffusers.Flux2KleinPipeline(scheduler=None, vae=None, transformer=None, text_encoder=qwen,
                                            tokenizer=tokenizer)

    @staticmethod
    def encode_text(pipe, text, most):
        """The `text.embedding` of one prompt: txt [L, 3 D], hidden states of Qwen3 side by side; no pooled text. L is
        the limit of the tokenizer, at most `most`. Raises UserError if it is not finite."""
        length = min(pipe.tokenizer.model_max_length, most)
        layers = layers_read(pipe.text_encoder.config.num_hidden_layers)
        txt, _ = pipe.encode_prompt(text, max_sequence_length=length, text_encoder_out_layers=layers)
        chat = pipe.tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False,
                                                  add_generation_prompt=True, enable_thinking=False)
        return embedding(txt[0], txt.new_zeros(0), len(pipe.tokenizer(chat).input_ids) > length)


def text_positions(length, device):
    """The position of every text token: [L, 4] float32, (0, 0, 0, number)."""
    number = torch.arange(length, device=device).float()
    zero = torch.zeros_like(number)
    return torch.stack([zero, zero, zero, number], -1)
