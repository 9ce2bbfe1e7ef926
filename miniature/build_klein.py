"""The second miniature's generator: FLUX.2-klein's layout and classes, trained on the same drawn world.

Its VAE is the miniature's, with the statistics of its latents as a batch norm holds them. Its text encoder is a Qwen3
with a chat template. It is trained in two stages. The first learns the velocity of the miniature at guidance 1, which
is less noisy than eps - x0. The second is flow matching. A tenth of the captions are empty in both, so that
classifier-free guidance works; no guidance is distilled into it.
"""

import json
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderKLFlux2, Flux2Transformer2DModel, FluxTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextModel, Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM, T5EncoderModel

from flow import Condition
from klein import Klein
from miniature import world
from miniature.build_flow import (
    FLOW_BATCH,
    GRID,
    Learnt,
    Model,
    Words,
    draw_batch,
    draw_latents,
    network,
    tokenizers,
)
from miniature.fitting import SEED

COPY_STEPS = 1400
FLOW_STEPS = 600
TOKENS = 20  # length of a text with its chat template
LAYERS = 4   # of the text encoder; the transformer reads what the first three of them give
WIDTH = 64
ROLES = ("<|im_start|>", "<|im_end|>")
PADDING = "<|endoftext|>"
TEMPLATE = ("{% for message in messages %}<|im_start|>{{ message.role }} {{ message.content }}<|im_end|>{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}")


def new_vae(folder):
    """The VAE of the miniature in `folder`, as FLUX.2's class. All channels have the same statistics, so that a latent
    is the same number in both miniatures."""
    theirs = AutoencoderKL.from_pretrained(folder / "vae")
    same = ("block_out_channels", "down_block_types", "up_block_types", "layers_per_block", "latent_channels",
            "norm_num_groups", "sample_size", "use_quant_conv", "use_post_quant_conv", "mid_block_add_attention")
    vae = AutoencoderKLFlux2(**{key: theirs.config[key] for key in same})
    vae.load_state_dict(theirs.state_dict() | vae.bn.state_dict(prefix="bn."))
    vae.bn.running_mean.fill_(theirs.config.shift_factor)
    vae.bn.running_var.fill_(theirs.config.scaling_factor**-2 - vae.config.batch_norm_eps)
    return vae.eval()


def tokenizer():
    """A Qwen2 tokenizer of the world's own words, with a chat template. Any other text is split into bytes."""
    words = {"user", "assistant", *(word for text in world.all_captions() + world.STYLES for word in text.split())}
    cased = sorted({form for word in words for form in (word, word.lower(), word.capitalize())})
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    texts = [text for word in cased for text in (word, f" {word}")]
    bpe.train_from_iterator(texts * 3, trainers.BpeTrainer(vocab_size=2000, special_tokens=letters,
                                                           show_progress=False))
    trained = bpe.get_vocab()
    known = Qwen2Tokenizer(vocab={**trained, PADDING: len(trained)}, merges=merges_of(bpe), model_max_length=TOKENS,
                           extra_special_tokens=list(ROLES), padding_side="right")
    known.chat_template = TEMPLATE
    return known


def merges_of(bpe):
    """The merges of a trained byte-pair encoding, a list of pairs."""
    return [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]


def new_text_encoder(words):
    """Qwen3 with four layers of width 64."""
    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(words), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=2, num_key_value_heads=2, head_dim=32, max_position_embeddings=512,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=words.convert_tokens_to_ids(ROLES[1]),
        pad_token_id=words.pad_token_id))


def new_transformer():
    """FLUX.2's transformer with 2 double and 4 single blocks of width 128. All blocks share their modulation."""
    return Flux2Transformer2DModel(
        patch_size=1, in_channels=64, num_layers=2, num_single_layers=4, attention_head_dim=32, num_attention_heads=4,
        joint_attention_dim=3 * WIDTH, axes_dims_rope=(8, 8, 8, 8), guidance_embeds=False)


class Generator(NamedTuple):
    """The transformer and the VAE, the text encoder, and its tokenizer."""
    net: Klein
    text: Qwen3ForCausalLM
    words: Qwen2Tokenizer

    def ids(self, texts):
        """Token ids [B, TOKENS] of B texts in the chat template."""
        chats = [self.words.apply_chat_template([{"role": "user", "content": text}], tokenize=False,
                                                add_generation_prompt=True) for text in texts]
        return self.words(chats, padding="max_length", truncation=True, max_length=TOKENS,
                          return_tensors="pt").input_ids

    def condition(self, ids):
        """The `Condition` of token ids [B, TOKENS]."""
        mask = (ids != self.words.pad_token_id).long()
        hidden = self.text.model(ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states
        return Condition(torch.cat(hidden[1:LAYERS], -1), torch.zeros(len(ids), 0), GRID)  # [B, TOKENS, 192]


def teacher_of(folder):
    """The miniature in `folder`, as its own build has it: a `build_flow.Model`."""
    transformer = FluxTransformer2DModel.from_pretrained(folder / "transformer").requires_grad_(False)
    clip = CLIPTextModel.from_pretrained(folder / "text_encoder").requires_grad_(False)
    t5 = T5EncoderModel.from_pretrained(folder / "text_encoder_2").requires_grad_(False)
    return Model(network(transformer, None), clip, t5, Words(*tokenizers()))


def learnt(shop, generator, teacher):
    """The `Learnt` of the build: latents and the ids of their captions, this model's TOKENS and then the teacher's."""
    vae = generator.net.vae
    data = shop.kept("latents", draw_latents, vae, shop.amount(160))
    mean, std = generator.net.statistics()
    z = (data.pop("z").float() / data.pop("scale") + data.pop("shift") - mean) / std  # [N, 16, 64]

    def ids(texts):
        return torch.cat([generator.ids(texts), teacher.words.ids(texts).flatten(1)], 1)

    texts = world.captions(world.Scenes(**data))
    cased = (texts, [text.lower() for text in texts], [text.capitalize() for text in texts])
    return Learnt(z.half(), torch.stack([ids(each) for each in cased]), ids([""])[0])


def build_klein(shop, folder):
    """Train the transformer and the text encoder in both stages. folder: of the miniature, whose VAE is taken. Returns
    a `Generator`."""
    words = tokenizer()
    vae = new_vae(folder)
    torch.manual_seed(SEED)
    text = new_text_encoder(words)
    transformer = new_transformer()
    generator = Generator(Klein(transformer, vae, {}, torch.device("cpu"), torch.float32), text, words)
    teacher = teacher_of(folder)
    data = learnt(shop, generator, teacher)

    def copy_loss(step):
        batch = draw_batch(data, FLOW_BATCH)
        with torch.no_grad():
            c = teacher.condition(batch.ids[:, TOKENS:].unflatten(1, (2, -1)))
            target = teacher.net.velocity(batch.x_t, batch.sigma, c, 1.0)
        return F.mse_loss(velocity(batch), target)

    def flow_loss(step):
        batch = draw_batch(data, FLOW_BATCH)
        return F.mse_loss(velocity(batch), batch.eps - batch.x0)

    def velocity(batch):
        return generator.net.velocity(batch.x_t, batch.sigma, generator.condition(batch.ids[:, :TOKENS]), 1.0)

    parts = {"transformer": transformer, "text": text}
    shop.fit("copy", parts, copy_loss, steps=COPY_STEPS, lr=2.5e-3)
    shop.fit("klein", parts, flow_loss, steps=FLOW_STEPS, lr=6e-4)
    return generator
