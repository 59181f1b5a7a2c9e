"""A vision-language-action model: a frozen backbone with LoRA, a sensor encoder, an action expert.

The backbone reads the sentence and sees the pictures. Its lower layers are frozen; the upper
`live_layers` carry LoRA. The expert makes a chunk of actions of noise, looking at the backbone's
last hidden states and the sensors. So what lies below the first layer with LoRA makes the same of a
sample in every epoch, and can be kept (`memory.feature_cache`).

Letters: `B` samples, `C` cameras, `P` pixels of a side, `T` tokens of the sentence, `S` sensors,
`H` steps of a chunk, `A` actions, `K` candidates.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expt.errors import ConfigError, nearest, share_problems
from expt.jobs.vla.backbone import Backbone
from expt.jobs.vla.expert import Expert
from expt.jobs.vla.lora import adapted, add_lora, cast_by_autocast
from expt.jobs.vla.objective import OBJECTIVES
from expt.jobs.vla.text import CELL_PIXELS, SMALL

LEAST = {"rank": 0, "live_layers": 1, "expert_depth": 1, "steps": 1, "samples": 1}
"""The least that arguments may be."""
DTYPES = ("float32", "bfloat16", "float16")
EARLY, LATE = "early_", "late_"
"""Before the names of features from before the first layer, and from after the last."""


class VLA(nn.Module):
    """Chunks of actions from pictures, a sentence and sensors.

    Args:
        action_size: the data's, A.
        state_size: the data's, S.
        chunk: the data's, H.
        cameras: the data's, C; 0: no pictures.
        pixels: of a side of the data's pictures, P.
        backbone: ``small``; a local folder of a vision-language model of transformers, with its
            config.json; or such a config as a mapping with ``model_type``.
        image_size: pixels of a side that pictures are brought to; None: as the backbone wants them.
        dtype: of the frozen weights; None: as the backbone has them.
        trained_dtype: of the trained weights; None: float32.
        live_layers: upper layers of the language part that carry LoRA; None: all of them.
        rank: of LoRA; 0: none, and all of the backbone is frozen.
        alpha: what LoRA adds is multiplied by alpha / rank.
        dropout: in LoRA.
        targets: patterns of the names of linear layers with LoRA; None: all in the live layers.
        expert_width: of the action expert.
        expert_depth: its layers.
        expert_heads: of its attention.
        objective: ``flow`` or ``ddpm``; see `expt.jobs.vla.objective`.
        steps: from noise to actions, in evaluation.
        samples: candidates K, of which the one nearest to all others is chosen.

    """

    def __init__(
        self,
        action_size: int,
        state_size: int,
        chunk: int,
        cameras: int = 0,
        pixels: int = 0,
        backbone: str | Mapping[str, Any] = SMALL,
        image_size: int | None = None,
        dtype: str | None = None,
        trained_dtype: str | None = None,
        live_layers: int | None = None,
        rank: int = 16,
        alpha: int = 32,
        dropout: float = 0.0,
        targets: Sequence[str] | None = None,
        expert_width: int = 512,
        expert_depth: int = 10,
        expert_heads: int = 8,
        objective: str = "flow",
        steps: int = 10,
        samples: int = 1,
    ) -> None:
        super().__init__()
        self.backbone = _backbone(backbone, dtype, image_size, cameras > 0)
        self.backbone.requires_grad_(False)
        layers = self.backbone.depth
        live = layers if live_layers is None else live_layers
        if live > layers:
            raise ConfigError(
                f"model.live_layers={live} is more than the {layers} layers that the backbone has"
            )
        self.frozen_depth = layers if rank == 0 else layers - live
        if rank > 0:
            add_lora(self.backbone, self.frozen_depth, rank, alpha, dropout, targets)
        self._adapted = adapted(self.backbone) if rank > 0 else []  # once, not in every pass
        self.objective, self.steps, self.samples = OBJECTIVES[objective](), steps, samples
        width = expert_width
        self.sensors = nn.Sequential(
            nn.Linear(state_size, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.context = nn.Linear(self.backbone.width, width)
        self.context_norm = nn.LayerNorm(width)
        self.vision_context = (
            Cells(self.backbone.vision_width, width, cameras * (-(-pixels // CELL_PIXELS)) ** 2)
            if self.backbone.vision_width
            else None
        )
        self.expert = Expert(action_size, chunk, width, expert_depth, expert_heads)
        wanted = getattr(torch, trained_dtype or "float32")  # PEFT's are as the frozen ones are
        for weight in self.parameters():
            if weight.requires_grad and weight.dtype != wanted:
                weight.data = weight.data.to(wanted)

    @classmethod
    def problems(cls, arguments: Mapping[str, Any]) -> list[str]:
        """Judge the arguments before the model is built; see `expt.job.Checked`."""
        found: list[str] = []
        backbone = arguments.get("backbone", SMALL)
        if isinstance(backbone, Mapping):
            if "model_type" not in backbone:
                found.append(
                    "model.backbone: a config as a mapping needs model_type, like qwen2_5_vl"
                )
        elif backbone != SMALL and not (Path(backbone).expanduser() / "config.json").is_file():
            found.append(
                f"model.backbone={backbone}: there is no such folder with a config.json. Nothing "
                f"is downloaded: `hf download {backbone} --local-dir FOLDER` gets a model of the "
                "Hugging Face Hub, and model.backbone=FOLDER uses it; model.backbone=small needs "
                "none"
            )
        for name in ("dtype", "trained_dtype"):
            if arguments.get(name) is not None and arguments[name] not in DTYPES:
                found.append(
                    f"model.{name}={arguments[name]!r}: {nearest(arguments[name], DTYPES)}"
                )
        objective = arguments.get("objective", "flow")
        if objective not in OBJECTIVES:
            found.append(f"model.objective={objective!r}: {nearest(objective, OBJECTIVES)}")
        for name, least in LEAST.items():
            value = arguments.get(name)
            if value is not None and value < least:
                found.append(f"model.{name} must be at least {least}, got {value}")
        found += share_problems("model.dropout", arguments.get("dropout", 0.0))
        if objective == "ddpm" and arguments.get("steps", 10) > 100:
            found.append(f"model.steps={arguments['steps']} is more than the 100 levels of ddpm")
        width, heads = arguments.get("expert_width", 512), arguments.get("expert_heads", 8)
        if heads < 1 or width % heads:
            found.append(
                f"model.expert_width={width} cannot be divided by model.expert_heads={heads}"
            )
        return found

    def load_pretrained(self) -> str | None:
        """Read the backbone's weights, where it has any; see `expt.job.Pretrained`."""
        return self.backbone.load_pretrained()

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return LoRA's weights as ``backbone``, the others as ``expert``."""
        groups: dict[str, list[nn.Parameter]] = {"backbone": [], "expert": []}
        for name, weight in self.named_parameters():
            if weight.requires_grad:
                groups["backbone" if name.startswith("backbone.") else "expert"].append(weight)
        return groups

    def train(self, mode: bool = True) -> VLA:
        """Set the mode; the frozen backbone stays as in evaluation."""
        super().train(mode)
        self.backbone.train(mode)
        return self

    # What the feature cache asks for; see `expt.job.FeatureCached`.

    feature_modes = ("prefix", "vision", "alternating")

    def feature_inputs(self, mode: str) -> Sequence[str]:
        """Return the inputs that features stand for."""
        return ("tokens", "images")

    def features(
        self, mode: str, tokens: Tensor, images: Tensor | None = None, **others: Tensor
    ) -> dict[str, Tensor]:
        """Return what the layers below make of a sentence [B,T] and pictures [B,C,3,P,P]."""
        depth = self._depth(mode)
        found = self.backbone.below(tokens, images, depth)
        layers = self.backbone.depth
        when = LATE if depth == layers else EARLY if depth == 0 else ""
        return {when + key: value for key, value in found.items()}

    def frozen_part(self, mode: str) -> Iterator[tuple[str, nn.Module]]:
        """Yield the modules that `features` runs, with their names."""
        for name, module in self.backbone.below_parts(self._depth(mode)):
            yield f"backbone.{name}", module

    def without_frozen_part(self, mode: str) -> None:
        """Forget the modules that `features` runs."""
        self.backbone.drop_below(self._depth(mode))

    def feature_settings(self, mode: str) -> Mapping[str, Any]:
        """Return what features depend on beside the weights; see `expt.job.FeatureKeyed`.

        The rank of LoRA and the expert are not among it: trials of a search share features.
        """
        jobs = Path(__file__).parents[1]
        files = ("vla/backbone", "vla/layers", "vla/small", "vla/vlm", "vision_language/prompt")
        code = [(jobs / f"{name}.py").read_bytes() for name in files]
        return {
            "depth": self._depth(mode),
            "backbone": json.dumps(self.backbone.processing(), sort_keys=True, default=str),
            "code": hashlib.sha256(b"".join(code)).hexdigest(),
        }

    def _depth(self, mode: str) -> int:
        return {"prefix": self.frozen_depth, "vision": 0, "alternating": self.backbone.depth}[mode]

    def forward(
        self,
        state: Tensor,
        noise: Tensor,
        level: Tensor,
        tokens: Tensor | None = None,
        images: Tensor | None = None,
        actions: Tensor | None = None,
        **features: Tensor,
    ) -> Tensor:
        """Return actions [B,H,A], or [B,K,H,A] with the chosen candidate first.

        In training it returns `actions` plus the error of what the network said of noisy ones: the
        squared distance to the actions is then the objective's loss.

        Args:
            state: of the sensors [B,S].
            noise: [B,K,H,A].
            level: from 0 to 1, [B].
            tokens: int64 [B,T], negative where there is none.
            images: bytes [B,C,3,P,P].
            actions: [B,H,A]; looked at in training only.
            features: what `features` made of tokens and images, in their place.

        """
        cast_by_autocast(self._adapted, state.device.type)
        if not features:
            assert tokens is not None, "neither a sentence nor features of one"
            features = self.features("prefix", tokens, images)
        context, mask = self._context(features)
        dtype = self.context.weight.dtype
        sensed = self.sensors(state.to(dtype))
        if actions is not None and self.training:
            noisy, level, wanted = self.objective.blend(actions, noise[:, 0], level)
            said = self.expert(noisy.to(dtype), level, sensed, context, mask)
            errors: Tensor = said - wanted
            return actions + errors
        count = noise.shape[1]
        repeated = [part.repeat_interleave(count, dim=0) for part in (sensed, context, mask)]

        def network(noisy: Tensor, level: Tensor) -> Tensor:
            said: Tensor = self.expert(noisy.to(dtype), level, *repeated)
            return said.to(noise.dtype)

        found: Tensor = self.objective.sample(network, noise.flatten(0, 1), self.steps)
        if count == 1:
            return found
        return chosen_first(found.unflatten(0, (-1, count)))

    def _context(self, features: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the tokens that the expert looks at [B,M,W] and their mask [B,M]."""
        when = next(when for when in (LATE, EARLY, "") if f"{when}hidden" in features)
        depth = {EARLY: 0, "": self.frozen_depth, LATE: self.backbone.depth}[when]
        own = {key.removeprefix(when): value for key, value in features.items()}
        dtype = self.context.weight.dtype
        own["hidden"] = own["hidden"].to(_dtype_of(self.backbone) or dtype)
        hidden, mask = self.backbone.above(own, depth)
        context = self.context(hidden.to(dtype))
        if self.vision_context is not None and "vision" in own:
            seen = self.vision_context(own["vision"].to(dtype))
            context = torch.cat([context, seen], dim=1)
            mask = torch.cat([mask, mask.new_ones(seen.shape[:2])], dim=1)
        return self.context_norm(context), mask


class Cells(nn.Module):
    """Features of pictures' cells [B, C x cells, V] -> [B, C x cells, W], each with its place."""

    def __init__(self, vision_width: int, width: int, cells: int) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.LayerNorm(vision_width), nn.Linear(vision_width, width))
        self.place = nn.Parameter(0.02 * torch.randn(cells, width))

    def forward(self, features: Tensor) -> Tensor:
        """Return the features for the expert."""
        found: Tensor = self.project(features) + self.place
        return found


def chosen_first(candidates: Tensor) -> Tensor:
    """Return candidates [B,K,H,A] with the one first that is nearest to all others (the medoid)."""
    flat = candidates.flatten(2).float()
    chosen = torch.cdist(flat, flat).sum(dim=2).argmin(dim=1)  # [B]
    index = torch.arange(candidates.shape[1], device=chosen.device).repeat(chosen.shape[0], 1)
    order = torch.where(
        index == 0, chosen[:, None], torch.where(index == chosen[:, None], 0, index)
    )
    return candidates.gather(1, order[:, :, None, None].expand_as(candidates))


def _backbone(
    source: str | Mapping[str, Any],
    dtype: str | None,
    image_size: int | None,
    with_vision: bool,
) -> Backbone:
    if source == SMALL:
        from expt.jobs.vla.small import Small

        try:
            small = Small(with_vision)
        except ImportError as error:
            raise ConfigError(
                f"model=vla needs the packages of its extra: pip install 'expt[vla]' ({error})"
            ) from error
        return small if dtype is None else small.to(getattr(torch, dtype))
    from expt.jobs.vla.vlm import VisionLanguage

    return VisionLanguage(source, dtype, image_size)


def _dtype_of(module: nn.Module) -> torch.dtype | None:
    """Return the type of the frozen weights, None where there are none left."""
    frozen = (weight for weight in module.parameters() if not weight.requires_grad)
    return next((weight.dtype for weight in frozen if weight.is_floating_point()), None)
