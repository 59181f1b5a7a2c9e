"""A network that looks at single frames, and one over time that judges the clip.

Letters: `B` clips, `C` channels, `T` frames, `P` pixels of a side, `F` features of a frame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expt.errors import ConfigError, ModelError
from expt.jobs.clips.augment import normalised
from expt.jobs.clips.resnet import ResNet, depth_problem

HEADS = ("gru", "transformer")


class FrameSequence(nn.Module):
    """Logits of a clip and of each of its frames.

    Args:
        num_frames: the data's, T.
        num_channels: the data's, C; a backbone takes those of its configuration.
        depth: of the residual network over frames: 18, 34 or 50.
        width: channels of its first stage; 64 as published.
        stem_stride: of its first convolution; 1 for small frames.
        backbone: folder of a vision model of transformers, with its weights, instead of it.
        head: ``gru`` or ``transformer``.
        head_width: units of the network over time.
        heads: of the transformer's attention.
        dropout: before the last layers.

    """

    def __init__(
        self,
        num_frames: int,
        depth: int = 18,
        width: int = 64,
        stem_stride: int = 2,
        backbone: str | None = None,
        head: str = "gru",
        head_width: int = 256,
        heads: int = 4,
        dropout: float = 0.0,
        num_channels: int = 3,
    ) -> None:
        super().__init__()
        stride: Sequence[int] = (stem_stride, stem_stride)
        self.frame: nn.Module
        if backbone is None:
            own = ResNet(2, depth, width, (7, 7), stride, pool=True, channels=num_channels)
            self.frame, features = own, own.features
        else:
            theirs = TransformersBackbone(backbone)
            if theirs.channels != num_channels:
                raise ModelError(
                    f"model.backbone={backbone} takes pictures of {theirs.channels} channels; the "
                    f"data's clips have {num_channels}"
                )
            self.frame, features = theirs, theirs.features
        self.over_time = (
            OverTime(features, head_width)
            if head == "gru"
            else Attention(features, head_width, heads, num_frames)
        )
        self.dropout = nn.Dropout(dropout)
        self.of_frame = nn.Linear(features, 1)
        self.of_clip = nn.Linear(head_width, 1)

    @classmethod
    def problems(cls, arguments: Mapping[str, Any]) -> list[str]:
        """Judge the arguments before the model is built; see `expt.job.Checked`."""
        problem = depth_problem("model.depth", arguments.get("depth", 18))
        found = [problem] if problem else []
        head = arguments.get("head", "gru")
        if head not in HEADS:
            found.append(f"model.head={head!r} must be {' or '.join(HEADS)}")
        width, heads = arguments.get("head_width", 256), arguments.get("heads", 4)
        if head == "transformer" and width % heads:
            found.append(f"model.head_width={width} cannot be divided by model.heads={heads}")
        backbone = arguments.get("backbone")
        if backbone is not None and not Path(backbone).expanduser().is_dir():
            found.append(
                f"model.backbone={backbone}: there is no such folder; give one with a config.json "
                "and weights, as save_pretrained of transformers writes it. Nothing is downloaded"
            )
        return found

    def load_pretrained(self) -> None:
        """Read the weights of a backbone of transformers; see `expt.job.Pretrained`."""
        if isinstance(self.frame, TransformersBackbone):
            self.frame.load()

    # What a frozen network over frames makes can be kept; see `expt.job.FeatureCached`.

    feature_modes = ("prefix", "vision")

    def feature_inputs(self, mode: str) -> Sequence[str]:
        """Return the inputs that features stand for."""
        return ("clip",)

    def features(self, mode: str, clip: Tensor) -> dict[str, Tensor]:
        """Return what the network over frames makes of clips [B,C,T,P,P]: [B,T,F]."""
        pictures = normalised(clip).transpose(1, 2).flatten(0, 1)
        found: Tensor = self.frame(pictures)
        return {"frame_features": found.unflatten(0, (clip.shape[0], clip.shape[2]))}

    def frozen_part(self, mode: str) -> list[tuple[str, nn.Module]]:
        """Return the network over frames."""
        return [("frame", self.frame)]

    def without_frozen_part(self, mode: str) -> None:
        """Forget the network over frames."""
        self.frame = nn.Identity()

    def feature_settings(self, mode: str) -> Mapping[str, Any]:
        """Return nothing: weights, data and this file say all that features depend on."""
        return {}

    def forward(self, clip: Tensor | None = None, frame_features: Tensor | None = None) -> Tensor:
        """Return logits [B, 1+T] of a clip and its frames.

        Args:
            clip: [B,C,T,P,P].
            frame_features: what `features` made of it [B,T,F], in its place.

        """
        features = frame_features
        if features is None:
            assert clip is not None, "neither a clip nor features of one"
            features = self.features("prefix", clip)["frame_features"]
        summary = self.dropout(self.over_time(features))
        of_frames = self.of_frame(self.dropout(features)).squeeze(-1)
        return torch.cat([self.of_clip(summary), of_frames], dim=1)


class OverTime(nn.Module):
    """A GRU in both directions, and the largest of what it returns."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.gru = nn.GRU(features, width // 2, batch_first=True, bidirectional=True)

    def forward(self, features: Tensor) -> Tensor:
        """Return [B, width] of features [B,T,F]."""
        found: Tensor = self.gru(features)[0].amax(dim=1)
        return found


class Attention(nn.Module):
    """Two layers of a transformer encoder over frames, and the mean of what it returns."""

    def __init__(self, features: int, width: int, heads: int, frames: int) -> None:
        super().__init__()
        self.embed = nn.Linear(features, width)
        self.position = nn.Parameter(0.02 * torch.randn(frames, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, 2 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, features: Tensor) -> Tensor:
        """Return [B, width] of features [B,T,F]."""
        found: Tensor = self.encoder(self.embed(features) + self.position).mean(dim=1)
        return found


class TransformersBackbone(nn.Module):
    """A vision model of transformers, from a folder.

    Args:
        path: folder with its config.json, and its weights.

    """

    def __init__(self, path: str) -> None:
        super().__init__()
        try:
            from transformers import AutoConfig, AutoModel
        except ModuleNotFoundError as error:
            raise ConfigError(
                "model.backbone needs the package transformers, which is not installed: "
                "pip install 'expt[vla]'"
            ) from error
        self.path = str(Path(path).expanduser())
        config = AutoConfig.from_pretrained(self.path, local_files_only=True)
        self.model = AutoModel.from_config(config)  # type: ignore[no-untyped-call]
        sizes = getattr(config, "hidden_sizes", None)
        self.features: int = sizes[-1] if sizes else config.hidden_size
        self.channels: int = getattr(config, "num_channels", 3)

    def load(self) -> None:
        """Read the weights."""
        from transformers import AutoModel

        read = AutoModel.from_pretrained(self.path, local_files_only=True)
        self.model.load_state_dict(read.state_dict())

    def forward(self, pictures: Tensor) -> Tensor:
        """Return features [n, F] of frames [n,C,P,P]."""
        output = self.model(pixel_values=pictures)
        pooled = getattr(output, "pooler_output", None)
        if pooled is None:
            pooled = output.last_hidden_state.mean(dim=1)
        found: Tensor = pooled.flatten(1)
        if found.shape[1] != self.features:
            raise ModelError(
                f"the backbone in {self.path} returned {found.shape[1]} features, and its "
                f"config.json says {self.features}"
            )
        return found
