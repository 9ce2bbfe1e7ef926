"""PickScore v1 (arXiv 2305.01569): CLIP ViT-H/14 fine-tuned on the choices of Pick-a-Pic's users."""

import open_clip
import torch
import torch.nn.functional as F
import transformers

from engine.errors import UserError
from engine.hub import fetched
from engine.model.configs import check_folder, strict
from rewards import clip, clip_model
from rewards.base import Column, DotProduct

COLUMNS = {"pickscore": Column("Pick", ".3f")}


class PickReward(DotProduct):
    """A CLIPModel of transformers. The metric is exp(logit_scale) cos, about 22. r is a twentieth of it, about 1.1
    (released code)."""
    unit = 20.0
    fit = "crop-floor"

    def __init__(self, model, tokenizer):
        super().__init__(model, model.config.vision_config.image_size, open_clip.OPENAI_DATASET_MEAN,
                         open_clip.OPENAI_DATASET_STD)
        self.tokenizer = tokenizer

    def features(self, pixels):
        """Prepared pixels [B, 3, size, size] -> f [B, D] float32 of norm 1, with gradient."""
        return F.normalize(self.model.get_image_features(pixel_values=pixels).pooler_output.float(), dim=-1)

    def encode_text(self, texts):
        """B texts, truncated to 77 tokens -> C [B, D] float32 of norm exp(logit_scale) / 20."""
        tokens = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt",
                                max_length=self.model.config.text_config.max_position_embeddings)
        C = self.model.get_text_features(**tokens.to(self.device)).pooler_output.float()
        return self.model.logit_scale.exp() / self.unit * F.normalize(C, dim=-1)


def fetch(where=None):
    """The folder of a CLIPModel of transformers. The tokenizer is fetched as well, so that it cannot fail later. Raises
    UserError."""
    folder = fetched(where or "yuvalkirstain/PickScore_v1", ["*.json", "*.txt", "*.safetensors"])
    tokenizer_of(folder)
    return folder


def tokenizer_of(folder):
    """The folder of PickScore's tokenizer: its own folder if that has one, otherwise CLIP ViT-H's."""
    if (folder / "tokenizer_config.json").exists():
        return folder
    return fetched(clip.REPOSITORY, clip.TOKENIZER)


def load(folder, device):
    """The `PickReward` of a folder. Raises UserError if the tokenizer has more words than the network."""
    model = strict(transformers.CLIPModel, folder, torch.float32)
    words = tokenizer_of(folder)
    check_folder(words)
    tokenizer = transformers.CLIPTokenizerFast.from_pretrained(words)
    if len(tokenizer) > model.config.text_config.vocab_size:
        raise UserError(f"{words}: {len(tokenizer)} words, but the network knows "
                        f"{model.config.text_config.vocab_size}")
    return PickReward(model.to(device), tokenizer)


def image_network(where=None):
    """The `ImageNetwork` of CLIP ViT-H/14, which PickScore's network is. open_clip's version of it costs the same."""
    return clip_model.image_network()
