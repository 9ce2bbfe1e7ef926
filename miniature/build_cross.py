"""The miniature's reward that is no dot product: a small ImageReward, whose text encoder attends to the picture."""

import random

import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertTokenizer

from engine.files import write_whole
from miniature import world
from miniature.build_flow import world_words
from miniature.build_scorers import LOOKS_STEPS, augment, looks_loss
from miniature.build_vae import labelled_pictures
from miniature.fitting import SEED, save
from rewards import imagereward

CROSS_STEPS = 600
WORDS_STEPS = 150   # the first of them, with words about the look alone
MIXED_STEPS = 400   # up to this one, more and more words have a scene beside them
TAUGHT = (world.EXPOSURE, world.PHOTO, world.BRUSH, world.PHOTO)    # the axes in turn; "photo" is the hardest to see
WIDTH = 64          # channels of both towers: one attention head
SHARPNESS = 4.0     # a logit per unit of the score, so that scores lie within a few units of 0
CALM = 0.01         # weight of the loss that keeps scores near 0
LONGEST = 20        # tokens of a caption at most; the network itself takes 35


def shapes():
    """{name: shape} of the weights, with ImageReward.pt's names."""
    found = {}

    def linear(name, inputs, outputs):
        found[f"{name}.weight"] = (outputs, inputs)
        found[f"{name}.bias"] = (outputs,)

    def norm(name):
        found[f"{name}.weight"] = found[f"{name}.bias"] = (WIDTH,)

    eye, reader = "blip.visual_encoder", "blip.text_encoder"
    found[f"{eye}.cls_token"] = (1, 1, WIDTH)
    found[f"{eye}.pos_embed"] = (1, (world.SIZE // 8) ** 2 + 1, WIDTH)
    found[f"{eye}.patch_embed.proj.weight"] = (WIDTH, 3, 8, 8)
    found[f"{eye}.patch_embed.proj.bias"] = (WIDTH,)
    norm(f"{eye}.norm")
    for n in range(3):
        block = f"{eye}.blocks.{n}"
        norm(f"{block}.norm1")
        norm(f"{block}.norm2")
        linear(f"{block}.attn.qkv", WIDTH, 3 * WIDTH)
        linear(f"{block}.attn.proj", WIDTH, WIDTH)
        linear(f"{block}.mlp.fc1", WIDTH, 2 * WIDTH)
        linear(f"{block}.mlp.fc2", 2 * WIDTH, WIDTH)
    found[f"{reader}.embeddings.word_embeddings.weight"] = (len(vocabulary()), WIDTH)
    found[f"{reader}.embeddings.position_embeddings.weight"] = (imagereward.TOKENS, WIDTH)
    norm(f"{reader}.embeddings.LayerNorm")
    for n in range(2):
        layer = f"{reader}.encoder.layer.{n}"
        for part in ("attention", "crossattention"):
            for name in ("self.query", "self.key", "self.value", "output.dense"):
                linear(f"{layer}.{part}.{name}", WIDTH, WIDTH)
            norm(f"{layer}.{part}.output.LayerNorm")
        linear(f"{layer}.intermediate.dense", WIDTH, 2 * WIDTH)
        linear(f"{layer}.output.dense", 2 * WIDTH, WIDTH)
        norm(f"{layer}.output.LayerNorm")
    sizes = [WIDTH, 32, 16, 8, 4, 1]
    for n, inputs, outputs in zip(imagereward.LINEAR, sizes, sizes[1:], strict=False):
        linear(f"mlp.layers.{n}", inputs, outputs)
    return found


def vocabulary():
    """The words of its tokenizer, BERT's special ones first."""
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", ",",
            *sorted({word.strip(".").lower() for word in world_words()})]


def new_network():
    """ImageReward's three parts at the sizes of `shapes`.

    transformers' initial weights suit a width of 768; at this width the texts would hardly be heard for a thousand
    steps. So the reader's are those that keep a signal's size, and the head's linear layers are orthogonal."""
    net = imagereward.network(imagereward.renamed_all({name: torch.empty(s) for name, s in shapes().items()}))
    for part, start in (("text", nn.init.xavier_uniform_), ("mlp", nn.init.orthogonal_)):
        for module in net[part].modules():
            if isinstance(module, nn.Linear):
                start(module.weight)
                nn.init.zeros_(module.bias)
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight)
    return net


def score(net, seen, tokens):
    """Patches of B pictures [B, P, D] and the tokens of n texts for each, B n in all -> scores [B, n]."""
    n = len(tokens.input_ids) // len(seen)
    read = net["text"](tokens.input_ids, attention_mask=tokens.attention_mask,
                       encoder_hidden_states=seen.repeat_interleave(n, 0)).last_hidden_state
    return net["mlp"](read[:, 0]).view(len(seen), n)


def pair(scenes, axis, share, rng):
    """For each of B scenes two captions that differ in a word about the look: the high and the low word of an axis. A
    share of them says the word alone, without the scene."""
    _, low, high = world.WORDS[axis]
    found = []
    for kind, layout in zip(scenes.kind.tolist(), scenes.layout.tolist(), strict=True):
        plain = "" if rng.random() < share else world.caption(kind, layout)
        found.append([world.with_style(high, plain), world.with_style(low, plain)])
    return found


def words_loss(apart, u):
    """Cross-entropy of what the scores of two words differ by, logits [B], with an axis's values u [B]. The share of
    the way from the low word's pictures to the high word's is the probability of the high word. So the difference goes
    on growing between the two, where training a model has to pass."""
    low, high = world.RANGES[world.LOW][1], world.RANGES[world.HIGH][0]
    return F.binary_cross_entropy_with_logits(apart, ((u - low) / (high - low)).clamp(0, 1))


def build_cross(shop):
    """Train it so that of two captions that differ in a word about the look, the true one has the higher score. Returns
    its three parts. It does not learn whether the things of a caption are there.

    It learns in the order of what is hard: at first the image tower alone learns the ends of the axes, as
    `build_reward`'s does. Then the reader learns the words about the look, without a scene beside them, for a text that
    attends to a picture learns nothing for long if both are strange to it. Then it learns whole captions.
    """
    images, scenes = labelled_pictures(shop)
    tokenizer = BertTokenizer(vocab={word: n for n, word in enumerate(vocabulary())})
    torch.manual_seed(SEED)
    net = new_network()
    head = nn.Linear(WIDTH, len(world.AXES))
    alone, whole = shop.amount(WORDS_STEPS), shop.amount(MIXED_STEPS)

    def told(seen):
        return head(seen.mean(1))

    def look(picked):
        x = augment(images[picked].float() / 255) * 2 - 1
        return net["vision"](x).last_hidden_state

    def first_loss_of(step):
        picked = torch.randint(len(images), (64,))
        return looks_loss(told(look(picked)), scenes.look[picked])

    def loss_of(step):
        picked = torch.randint(len(images), (64,))
        truth = scenes[picked]
        axis = TAUGHT[step % len(TAUGHT)]
        share = min(1, max(0, (whole - step) / max(1, whole - alone)))
        texts = [text for both in pair(truth, axis, share, random.Random(step)) for text in both]
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")
        seen = look(picked)
        scores = score(net, seen, tokens)  # [64, 2]
        loss = words_loss(SHARPNESS * (scores[:, 0] - scores[:, 1]), truth.look[:, axis])
        return loss + looks_loss(told(seen), truth.look) + CALM * scores.square().mean()

    shop.fit("cross_looks", {"vision": net["vision"], "head": head}, first_loss_of, steps=LOOKS_STEPS, lr=1e-3)
    shop.fit("cross", {"net": net, "head": head}, loss_of, steps=CROSS_STEPS, lr=1e-3)
    return net


def export_cross(folder, net):
    """Write it as ImageReward's files, in fp16, with its tokenizer beside it.

    It was trained on pixels in [-1, 1], and ImageReward's are normalised by CLIP's mean and std. The patch embedding is
    linear, so it takes the difference."""
    state = dict(net.state_dict())
    mean, std = (torch.tensor(numbers).view(1, 3, 1, 1) for numbers in (imagereward.MEAN, imagereward.STD))
    patch = "vision.embeddings.patch_embedding."
    weight = state[f"{patch}weight"]  # [64, 3, 8, 8]
    state[f"{patch}weight"] = 2 * std * weight
    state[f"{patch}bias"] = state[f"{patch}bias"] + (weight * (2 * mean - 1)).sum((1, 2, 3))
    tensors = {name: state[imagereward.renamed(name)].half().contiguous() for name in shapes()}
    save(folder / imagereward.FILE, tensors)
    write_whole(folder / "vocab.txt", "\n".join(vocabulary()) + "\n")
