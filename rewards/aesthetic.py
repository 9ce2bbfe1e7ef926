"""Aesthetic predictor v2.5 (github.com/discus0434/aesthetic-predictor-v2-5): how much people like the look of a
picture, from 1 to 10. Its head, five linear layers, reads SigLIP's image feature."""

from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.initialization import no_init_weights

from engine.errors import UserError, one_line
from engine.hub import fetched
from engine.model.configs import must_be_floats, strict
from rewards import base

COLUMNS = {"aesthetic": base.Column("Aes", ".3f")}

# The head is published under the AGPL. So it is fetched from its repository, and this project does not contain it.
HEAD = "https://github.com/discus0434/aesthetic-predictor-v2-5/raw/main/models/aesthetic_predictor_v2_5.pth"

# SigLIP so400m's image side, from its config.json
SIGLIP = dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16,
              image_size=384, patch_size=14)


class AestheticReward(base.DotProduct):
    """The metric A(x) is about 5.9 of 10, and r is a tenth of it.

    It reads no text. So the relative reward compares the picture with the same picture plus a little noise (S1 of the
    paper's supplement): f = (A(x), A(x + noise)) / 10, C0 = C1 = (1, 0), C2 = (0, 1). With these, Eqs. 7-13 hold as
    they are. The words of --control and --neg change nothing.

    The noise is one fixed pattern with standard deviation NOISE, on pixels in [0, 1] at the model's size [ours: the
    paper gives no number].
    """
    unit = 10.0
    fit = "stretch"
    NOISE = 0.1

    def __init__(self, model, head):
        size = model.config.image_size
        super().__init__(model, size, [0.5] * 3, [0.5] * 3)
        self.head = head.eval().requires_grad_(False)
        pattern = torch.randn(3, size, size, generator=torch.Generator().manual_seed(0))
        # Prepared pixels are (x - 0.5) / 0.5. So noise of 0.1 on x is noise of 0.2 on them.
        self.noise = (self.NOISE / 0.5 * pattern).to(self.device)

    def rated(self, pixels):
        """A(x) / 10: prepared pixels [B, 3, size, size] -> [B]."""
        feature = F.normalize(self.model(pixels).pooler_output.float(), dim=-1)    # [B, D]; the head is float32
        return self.head(feature).squeeze(-1) / self.unit

    def features(self, pixels):
        """Prepared pixels [B, 3, size, size] -> f [B, 2] float32, with gradient: clean, noised."""
        return torch.stack([self.rated(pixels), self.rated(pixels + self.noise)], -1)

    def condition(self, texts, n):
        """C [B, 2]: C0 = C1 select the clean picture's score, C2 the noised one's."""
        return torch.eye(2, device=self.device)[n // 2].expand(len(texts[n]), 2)

    def reads_alike(self, one, other):
        """It reads no text: the noised picture is what differs."""
        return False


# ---------------------------------------------------------------------------------------------------- loading
def fetch(where=None):
    """The folder of a SigLIP. The head is fetched as well, so that it cannot fail later. Raises UserError."""
    folder = fetched(where or "google/siglip-so400m-patch14-384", ["*.json", "*.safetensors"])
    head_of(folder)
    return folder


def head_of(folder):
    """The head's weights {name: tensor}, from aesthetic_predictor_v2_5.pth in SigLIP's folder, otherwise from its
    repository. Raises UserError if neither can be read."""
    own = folder / Path(HEAD).name
    try:
        if own.is_file():
            return must_be_floats(torch.load(own, map_location="cpu", weights_only=True))
        return torch.hub.load_state_dict_from_url(HEAD, map_location="cpu", weights_only=True, progress=False)
    except Exception as error:
        place = own if own.is_file() else HEAD
        raise UserError(f"{place}: cannot be had: {one_line(error)}") from error


def load(folder, device):
    """The `AestheticReward` of a SigLIP folder and the head."""
    state = {name.removeprefix("scoring_head."): value for name, value in head_of(folder).items()}
    layers = OrderedDict()
    for at in ("0", "2", "4", "6", "8"):    # 1, 3, 5 and 7 are dropouts; there is no activation
        out_features, in_features = state[f"{at}.weight"].shape
        layers[at] = nn.Linear(in_features, out_features)
    head = nn.Sequential(layers)
    head.load_state_dict(state)
    network = strict(transformers.SiglipVisionModel, folder, torch.float32, unread=("text_model.", "logit_"))
    return AestheticReward(network.to(device), head.to(device))


# --------------------------------------------------------------------------------------------------- the plan
def image_network(where=None):
    """The `ImageNetwork` of SigLIP so400m. It is called twice for an image: clean and noised."""
    with no_init_weights():
        network = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIGLIP))

    def look(pixels):
        return network(pixels).pooler_output

    call = base.on_zeros(look, SIGLIP["image_size"])
    return base.ImageNetwork(network.requires_grad_(False), call, times=2)
