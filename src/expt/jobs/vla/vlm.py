"""Any vision-language model of transformers as a backbone: from a local folder, or a config alone.

The model's own code runs: pictures go through its `get_image_features`, its own forward puts them
where the prompt has places for them, and its language part is cut between two layers
(`expt.jobs.vla.layers`). Models differ in how pictures are handed over, which the arguments of
`get_image_features` tell: patches with a grid (the Qwen-VL family), or pictures of one size (LLaVA,
PaliGemma, InternVL, Idefics and others).

Letters: `B` samples, `C` cameras, `P` pixels, `T` tokens of the sentence, `N` tokens in all, `D`
width.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expt.errors import ConfigError
from expt.jobs.vision_language.prompt import Prompts
from expt.jobs.vision_language.reading import from_config, load_weights, read_config
from expt.jobs.vla.backbone import Backbone, random_weights, without_adapters
from expt.jobs.vla.layers import Catch, HandOn, exchanged, layers_of

AUTO, KEY = "AutoModel", "model.backbone"
"""How transformers finds the class of the model, and which setting it is of."""
MASK, ONLY = "mask_of_", "all_layers"
"""Before the names of masks that a model makes itself, and the name where it has only one."""


class VisionLanguage(Backbone):
    """A vision-language model of transformers, cut between two layers of its language part.

    Args:
        source: a local folder with its config.json, and its weights where it has any; or the config
            as a mapping with ``model_type``.
        dtype: of its weights, like ``bfloat16``; None: as the config says.
        image_size: pixels of a side that pictures are brought to; None: the model's own size, or,
            where it takes any, the pictures' rounded to its patches.

    Raises:
        ConfigError: the folder or the config cannot be read, or is of no such model.

    """

    def __init__(
        self, source: str | Mapping[str, Any], dtype: str | None, image_size: int | None
    ) -> None:
        super().__init__()
        self.folder = None if isinstance(source, Mapping) else Path(source).expanduser()
        config = read_config(source, KEY)
        self.dtype = getattr(torch, dtype) if dtype else None
        with random_weights():
            self.model = from_config(AUTO, config, self.dtype, KEY)
        self._check()
        language = self.model.get_decoder()
        self._names = {id(part): name for name, part in self.named_modules()}
        self._language_name = self._names[id(language)]
        self._layers_name = layers_of(language)
        self.depth = len(self.layers())
        self.width = int(language.config.hidden_size)
        self.prompts = Prompts(self.model, image_size, self.folder)

    def _check(self) -> None:
        config, model = self.model.config, self.model
        kind = config.model_type
        if not hasattr(model, "get_image_features"):
            raise ConfigError(f"model.backbone: {kind} is no model that sees pictures")
        if (
            "mm_encoder_outputs"
            not in inspect.signature(inspect.unwrap(type(model).forward)).parameters
        ):
            raise ConfigError(
                f"model.backbone: {kind} does not take its pictures' features "
                "(mm_encoder_outputs), so it cannot be cut; qwen2_5_vl, llava and paligemma can"
            )
        if getattr(config.vision_config, "deepstack_visual_indexes", None):
            raise ConfigError(
                f"model.backbone: {kind} gives pictures to several language layers "
                "(deepstack_visual_indexes), so that a cut between them loses some; qwen2_5_vl, "
                "llava and paligemma can be cut"
            )

    @property
    def language(self) -> nn.Module:
        """The language part."""
        return self.get_submodule(self._language_name)

    def processing(self) -> dict[str, Any]:
        """See `Backbone.processing`."""
        import transformers

        return {
            "config": self.model.config.to_dict(),
            "image_size": self.prompts.image_size,
            "mean": list(self.prompts.mean),
            "deviation": list(self.prompts.deviation),
            "transformers": transformers.__version__,
        }

    def layers(self) -> nn.ModuleList:
        """See `Backbone.layers`."""
        found = self.language._modules[self._layers_name]
        assert isinstance(found, nn.ModuleList)
        return found

    def lower(self) -> Iterable[tuple[str, nn.Module]]:
        """See `Backbone.lower`; all that is neither a layer nor what follows the layers."""
        language = self.language
        embeddings = self.model.get_input_embeddings()
        for name, part in self.model.named_children():
            if part is not language and not isinstance(part, HandOn):
                yield f"model.{name}", part
        for name, part in language.named_children():
            if part is embeddings:
                yield f"{self._language_name}.{name}", part

    def load_pretrained(self) -> str | None:
        """Read the folder's weights; a config alone has none, which is what to say.

        Raises:
            ConfigError: the folder has no weights, or not all of this model's.

        """
        if self.folder is None:
            return "the backbone has random weights; model.backbone=FOLDER reads trained ones"
        load_weights(AUTO, self.model, self.folder, self.dtype, KEY, without_adapters)
        return None

    def below(self, tokens: Tensor, images: Tensor | None, depth: int) -> dict[str, Tensor]:
        """See `Backbone.below`; ``positions`` [B, ...] and masks where the model makes its own."""
        ids, mask, more = self.prompts(tokens, images)
        language, caught = self.language, Catch()
        layers: list[nn.Module] = list(self.layers())
        whole = depth == len(layers)
        layers[depth:] = [HandOn() for _ in layers[depth:]]
        if not whole:
            layers[depth] = caught
        handed: dict[str, Any] = {}

        def look(module: nn.Module, arguments: Any, named: dict[str, Any]) -> None:
            handed.update(named)

        handle = language.register_forward_pre_hook(look, with_kwargs=True)
        try:
            with exchanged(language, self._layers_name, layers):
                output = self.model(
                    input_ids=ids, attention_mask=mask.long(), use_cache=False, **more
                )
        finally:
            handle.remove()
        features = {"hidden": output.last_hidden_state if whole else caught.caught[0], "mask": mask}
        if whole:
            return features
        own = handed.get("position_ids")
        if own is not None:
            own = own.movedim(1, 0) if own.ndim == 3 else own  # [axes,B,N], or [B,N], or [1,N]
            features["positions"] = own.expand(mask.shape[0], *own.shape[1:]).contiguous()
        return features | _own_masks(handed.get("attention_mask"), mask)

    def above(self, features: Mapping[str, Tensor], depth: int) -> tuple[Tensor, Tensor]:
        """See `Backbone.above`."""
        hidden, mask = features["hidden"], features["mask"]
        if depth == self.depth:
            return hidden, mask
        positions = features.get("positions")
        if positions is not None and positions.ndim == 3:
            positions = positions.movedim(0, 1)
        masks = {n.removeprefix(MASK): one for n, one in features.items() if n.startswith(MASK)}
        layers = [HandOn() if at < depth else layer for at, layer in enumerate(self.layers())]
        with exchanged(self.language, self._layers_name, layers):
            output = self.language(
                inputs_embeds=hidden,
                attention_mask=masks.get(ONLY, masks) if masks else mask.long(),
                position_ids=positions,
                use_cache=False,
            )
        return output.last_hidden_state, mask


def _own_masks(handed: Any, mask: Tensor) -> dict[str, Tensor]:
    """Return the masks [B,1,N,N] that a model makes of ours [B,N]; none where it hands ours on."""
    masks = handed if isinstance(handed, Mapping) else {ONLY: handed}
    if any(isinstance(one, Tensor) and one.ndim == 2 for one in masks.values()):
        return {}
    tokens = mask.shape[1]
    causal = mask.new_ones(tokens, tokens).tril() & mask[:, None, None, :]  # what None stands for
    return {
        MASK + name: (causal if one is None else one).expand(mask.shape[0], -1, -1, -1).contiguous()
        for name, one in masks.items()
    }
