"""A whole vision-language model of transformers, with its own language-modelling head.

Every weight can be trained, all or by stages (`trainer.trainable`): the names are those of
transformers, so that ``*multi_modal_projector*`` is LLaVA's projector.

Letters: `B` samples, `C` pictures of a sample, `P` pixels, `T` tokens of the sentence, `V` words.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expt.errors import ConfigError, ModelError
from expt.jobs.vision_language.prompt import Prompts
from expt.jobs.vision_language.reading import from_config, load_weights, read_config

AUTO, KEY = "AutoModelForImageTextToText", "model.source"
"""How transformers finds the class of the model, and which setting it is of."""


class ImageTextModel(nn.Module):
    """Scores of the next word after every token of a sentence about pictures.

    Args:
        source: a local folder with config.json and weights, or the config as a mapping with
            ``model_type``; random weights are trained then.
        dtype: of the weights, like ``bfloat16``; None: as the config says.
        image_size: pixels of a side that pictures are brought to; None: as the model has it.

    Raises:
        ConfigError: the folder or the config cannot be read, or is of no such model.

    """

    def __init__(
        self,
        source: str | dict[str, Any],
        dtype: str | None = None,
        image_size: int | None = None,
    ) -> None:
        super().__init__()
        self.folder = None if isinstance(source, Mapping) else Path(source).expanduser()
        if dtype is not None and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ConfigError(f"model.dtype={dtype} is no type of torch; try bfloat16 or float32")
        self.dtype = getattr(torch, dtype) if dtype else None
        config = read_config(source, KEY)
        self.model: Any = from_config(AUTO, config, self.dtype, KEY)
        if not hasattr(self.model, "get_image_features"):
            raise ConfigError(f"{KEY}: {config.model_type} is no model that sees pictures")
        self.prompts = Prompts(self.model, image_size, self.folder, answers=True)
        taken = inspect.signature(inspect.unwrap(type(self.model).forward)).parameters
        self._chooses = "logits_to_keep" in taken

    def load_pretrained(self) -> str | None:
        """Read the folder's weights; a config alone has none, which is what to say."""
        if self.folder is None:
            return f"the model begins with random weights; {KEY}=FOLDER reads trained ones"
        load_weights(AUTO, self.model, self.folder, self.dtype, KEY)
        return None

    def forward(self, images: Tensor, tokens: Tensor, **others: Tensor) -> Tensor:
        """Return logits [B,T,V] of the word that follows each token.

        Args:
            images: uint8 [B,C,3,P,P], which come before the sentence.
            tokens: int64 [B,T], negative where there is none.
            others: what else the data has; not used.

        Raises:
            ModelError: a token is none of the model's words.

        """
        words = int(self.model.config.get_text_config().vocab_size)
        if tokens.device.type == "cpu" and tokens.numel() and int(tokens.max()) >= words:
            raise ModelError(f"token {int(tokens.max())} is none of the model's {words} words")
        ids, mask, more = self.prompts(tokens, images)
        length = tokens.shape[1]
        # Nothing is said in the pictures' places: their scores are not even computed.
        kept = {"logits_to_keep": length} if self._chooses else {}
        output = self.model(
            input_ids=ids, attention_mask=mask.long(), use_cache=False, **more, **kept
        )
        logits: Tensor = output.logits
        return logits[:, -length:]
