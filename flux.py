"""What only FLUX.1 has: the call of its network, its latents, its time shift, its text encoders.

The miniature and FLUX.1-dev take the same path through this file. Shapes as in flow.py; C = 64 channels a token
(2 x 2 latents of 16 channels).
"""

import math

import diffusers
import torch
import transformers

from engine.model import configs
from engine.model.text import embedding, tokenizer_of
from flow import Flow, pack, positions, unpack


class Flux(Flow):
    """The two networks of FLUX.1: a FluxTransformer2DModel and an AutoencoderKL."""

    def time_embedding(self):
        """The module that is called with 1000 sigma, 1000 guidance if the model embeds it, and the pooled text."""
        return self.transformer.time_text_embed

    def shift(self, n_tokens, steps=None):
        """The model's own time shift: exp(mu) with mu linear in the tokens, as FluxPipeline samples (4096
        tokens of FLUX.1-dev: 3.16), whatever the number of steps. The released code trains with a fixed 3."""
        c = self.scheduler
        if not c.get("use_dynamic_shifting"):
            return c.get("shift", 1.0)
        slope = (c["max_shift"] - c["base_shift"]) / (c["max_image_seq_len"] - c["base_image_seq_len"])
        return math.exp(c["base_shift"] + slope * (n_tokens - c["base_image_seq_len"]))

    def predict(self, x_t, sigma, c, guidance):
        """One call of the network: the velocity [B, N, C] float32. Arguments as in `Flow.velocity`."""
        b = len(x_t)
        sigma = self.numbers(sigma, b)
        guidance = self.numbers(guidance, b)
        if not self.transformer.config.guidance_embeds:
            guidance = None
        self.exact_times.scales = [sigma] if guidance is None else [sigma, guidance]
        return self.transformer(
            hidden_states=x_t.to(self.dtype), timestep=sigma, guidance=guidance,
            encoder_hidden_states=c.txt.to(self.dtype), pooled_projections=c.pooled.to(self.dtype),
            img_ids=positions(c.grid, 3, self.device),
            txt_ids=torch.zeros(c.txt.shape[1], 3, device=self.device),
            return_dict=False)[0].float()

    def latent_mean(self):
        """The VAE's shift of its latents; none in some configs."""
        return self.vae.config.shift_factor or 0.0

    def decode(self, x, grid):
        """Packed latents [B, N, C] -> images [B, 3, H, W] in [0, 1], with gradient."""
        z = unpack(x, grid) / self.vae.config.scaling_factor + self.latent_mean()
        return (self.vae.decode(z.to(self.vae.dtype)).sample.float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode(self, images):
        """Images [B, 3, H, W] in [0, 1] -> packed latents [B, N, C] float32, without gradient: the mean of
        what the VAE's encoder gives, scaled as the transformer knows it. The inverse of `decode`."""
        images = (2 * images - 1).to(self.device, self.vae.dtype)
        z = self.vae.encode(images).latent_dist.mode().float()  # [B, c, h, w]
        return pack((z - self.latent_mean()) * self.vae.config.scaling_factor)

    @staticmethod
    def text_encoders(model, dtype):
        """A FluxPipeline with only the text encoders of a `Model` and their tokenizers. Raises UserError."""
        clip = configs.strict(transformers.CLIPTextModel, model.part("text_encoder"), dtype, use_safetensors=True,
                              unread=("text_model.embeddings.position_ids",), checked=True)
        t5 = configs.strict(transformers.T5EncoderModel, model.part("text_encoder_2"), dtype, use_safetensors=True,
                            unread=("encoder.embed_tokens.weight",), checked=True)
        return diffusers.FluxPipeline(
            scheduler=None, vae=None, transformer=None, text_encoder=clip, text_encoder_2=t5,
            tokenizer=tokenizer_of(transformers.CLIPTokenizerFast, model.part("tokenizer"), clip),
            tokenizer_2=tokenizer_of(transformers.T5TokenizerFast, model.part("tokenizer_2"), t5))

    @staticmethod
    def encode_text(pipe, text, most):
        """The `text.embedding` of one prompt, by both text encoders of a FluxPipeline: txt [L, D] of T5, pooled [D'] of
        CLIP; L is the limit of T5's tokenizer, at most `most`. Raises UserError if it is not finite."""
        length = min(pipe.tokenizer_2.model_max_length, most)
        txt, pooled, _ = pipe.encode_prompt([text], max_sequence_length=length)
        return embedding(txt[0], pooled[0], len(pipe.tokenizer_2(text).input_ids) > length)
