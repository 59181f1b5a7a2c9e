"""How a vision-language model of transformers is given pictures and a sentence.

Models differ in how pictures are handed over, which the arguments of `get_image_features` tell:
patches with a grid (the Qwen-VL family), or pictures of one size (LLaVA, PaliGemma, InternVL,
Idefics and others).

Letters: `B` samples, `C` cameras (pictures of a sample), `P` pixels, `S` pixels of the model's own
pictures, `M` pictures, `T` tokens of the sentence, `N` tokens in all.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from expt.errors import ModelError

MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP's pictures (Radford et al., ICML 2021), where a folder has no processor's settings."""


class Prompts:
    """Makes what a model's forward takes of pictures and tokens.

    Args:
        model: of transformers, with `get_image_features`.
        image_size: pixels of a side that pictures are brought to; None: the model's own size, or,
            where it takes any, the pictures' rounded to its patches.
        folder: of the weights, whose processor's settings are read where there are any.
        answers: the sentence holds an answer, of which no word may look at a later one.

    """

    def __init__(
        self, model: Any, image_size: int | None, folder: Path | None, answers: bool = False
    ) -> None:
        self.model, self.image_size, self._answers = model, image_size, answers
        self._taken = inspect.signature(inspect.unwrap(type(model).forward)).parameters
        self.mean, self.deviation = _statistics(folder)
        taken = inspect.signature(inspect.unwrap(type(model).get_image_features)).parameters
        self._in_patches, self._nested = "image_grid_thw" in taken, "pixel_attention_mask" in taken

    def __call__(
        self, tokens: Tensor, images: Tensor | None
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Return ids [B,N] with places for pictures, their mask, and what else forward takes.

        Args:
            tokens: int64 [B,T], negative where there is none.
            images: uint8 [B,C,3,P,P].

        """
        present = tokens >= 0
        pad = self.model.config.get_text_config().pad_token_id
        ids = tokens.masked_fill(~present, int(pad) if isinstance(pad, int) and pad >= 0 else 0)
        if images is None:
            return ids, present, self._kinds(ids)
        batch, cameras = images.shape[:2]
        pictures = self.pictures(images.flatten(0, 1))
        arguments: dict[str, Any] = {"pixel_values": pictures}
        more: dict[str, Any] = {}
        if self._in_patches:
            arguments = self.patches(pictures)
            more["image_grid_thw"] = arguments["image_grid_thw"]
        elif self._nested:
            arguments["pixel_values"] = pictures.unflatten(0, (batch, cameras))
        seen = self.model.get_image_features(**arguments, return_dict=True)
        found = seen.pooler_output
        cells = found[0].shape[0] if not isinstance(found, Tensor) else found.shape[-2]
        places = torch.full(
            (batch, cameras, cells), self._placeholder(), dtype=ids.dtype, device=ids.device
        )
        start, end = self._marks()
        if start is not None and end is not None:
            mark = places.new_full((batch, cameras, 1), start)
            places = torch.cat([mark, places, places.new_full((batch, cameras, 1), end)], dim=2)
        places = places.flatten(1)
        ids = torch.cat([places, ids], dim=1)
        mask = torch.cat([torch.ones_like(places, dtype=torch.bool), present], dim=1)
        if "mm_token_type_ids" in self._taken:
            more["mm_token_type_ids"] = (ids == self._placeholder()).int()
        return ids, mask, {**more, **self._kinds(ids), "mm_encoder_outputs": {"image": seen}}

    def _kinds(self, ids: Tensor) -> dict[str, Tensor]:
        """Return what kind each token is of [B,N], where the model's mask depends on it."""
        if "token_type_ids" not in self._taken:
            return {}
        pictured = (ids == self._placeholder()).int()
        if self.model.config.model_type != "paligemma":
            return {"token_type_ids": pictured}
        # Its 1 is a word that only later ones look at; all others look at one another.
        return {"token_type_ids": 1 - pictured if self._answers else torch.zeros_like(pictured)}

    def _placeholder(self) -> int:
        config = self.model.config
        found = getattr(config, "image_token_id", None) or getattr(
            config, "image_token_index", None
        )
        if found is None:
            raise ModelError(f"{config.model_type} has no image_token_id in its config")
        return int(found)

    def _marks(self) -> tuple[int, int] | tuple[None, None]:
        config = self.model.config
        start, end = (
            getattr(config, f"vision_{which}_token_id", None) for which in ("start", "end")
        )
        return (int(start), int(end)) if start is not None and end is not None else (None, None)

    def pictures(self, images: Tensor) -> Tensor:
        """Return pictures [M,3,S,S] as the model wants them, of bytes [M,3,P,P]."""
        vision = self.model.config.vision_config
        size = self.image_size
        if self._in_patches:
            multiple = _first(vision.patch_size) * int(vision.spatial_merge_size)
            size = max(multiple, round((size or images.shape[-1]) / multiple) * multiple)
        else:
            size = size or _first(getattr(vision, "image_size", None) or images.shape[-1])
        pictures = images.float() / 255
        if size != images.shape[-1]:
            pictures = F.interpolate(
                pictures, (size, size), mode="bicubic", antialias=True, align_corners=False
            ).clamp(0, 1)
        mean, deviation = (
            torch.tensor(values, device=images.device).view(1, 3, 1, 1)
            for values in (self.mean, self.deviation)
        )
        return ((pictures - mean) / deviation).to(self.model.dtype)

    def patches(self, pictures: Tensor) -> dict[str, Tensor]:
        """Cut pictures [M,3,S,S] into patches [M x n, values] as Qwen's processor orders them."""
        vision = self.model.config.vision_config
        patch, merge = _first(vision.patch_size), int(vision.spatial_merge_size)
        frames = _first(vision.temporal_patch_size)
        side = pictures.shape[-1] // patch
        blocks = side // merge
        cut = pictures.reshape(-1, 3, blocks, merge, patch, blocks, merge, patch)
        cut = cut.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)  # one picture is `frames` equal ones
        cut = cut.expand(-1, -1, -1, -1, -1, -1, frames, -1, -1)
        grid = torch.tensor([1, side, side], device=pictures.device)
        return {
            "pixel_values": cut.reshape(-1, 3 * frames * patch * patch),
            "image_grid_thw": grid.repeat(len(pictures), 1),
        }


def _statistics(folder: Path | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of pictures as the folder's processor has them."""
    path = folder / "preprocessor_config.json" if folder is not None else None
    if path is None or not path.is_file():
        return MEAN, DEVIATION
    found = json.loads(path.read_text(encoding="utf-8"))
    return tuple(found.get("image_mean", MEAN)), tuple(found.get("image_std", DEVIATION))


def _first(size: Any) -> int:
    """Return the one number of a size that may be one number or two equal ones."""
    return int(size if isinstance(size, int) else size[0])
