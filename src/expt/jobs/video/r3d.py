"""A 3D residual network, and optionally a second stream of keypoints.

Letters: `B` clips, `C` channels, `T` frames, `P` pixels of a side, `J` keypoints of `D` values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from expt.jobs.clips.augment import normalised
from expt.jobs.clips.resnet import ResNet, depth_problem


class R3D(nn.Module):
    """3D ResNet over clips; by its defaults MONAI's, without pooling after the first convolution.

    Args:
        num_classes: the data's.
        num_channels: the data's, C; 3 of pictures.
        num_keypoints: the data's, J; 0 where it gives none, and then there is one stream.
        keypoint_values: the data's, D.
        depth: 18, 34 or 50.
        width: channels of the first stage; 64 as published.
        stem_kernel: of the first convolution: frames, height, width.
        stem_stride: of the first convolution.
        stem_pool: halve frames and pixels after it.
        frame_difference: factor of what changed from the frame before, which is given as C more
            channels; 0 gives none. A change is about a tenth of a picture.
        dropout: before the last layer.
        keypoint_width: units of the second stream.

    """

    def __init__(
        self,
        num_classes: int,
        num_keypoints: int = 0,
        keypoint_values: int = 0,
        depth: int = 18,
        width: int = 64,
        stem_kernel: Sequence[int] = (7, 7, 7),
        stem_stride: Sequence[int] = (1, 2, 2),
        stem_pool: bool = False,
        frame_difference: float = 0.0,
        dropout: float = 0.0,
        keypoint_width: int = 128,
        num_channels: int = 3,
    ) -> None:
        super().__init__()
        self.frame_difference = frame_difference
        channels = num_channels * (2 if frame_difference else 1)
        self.clip = ResNet(3, depth, width, stem_kernel, stem_stride, stem_pool, channels)
        self.keypoints = (
            KeypointStream(num_keypoints * keypoint_values, keypoint_width)
            if num_keypoints
            else None
        )
        features = self.clip.features + (keypoint_width if num_keypoints else 0)
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(features, num_classes))

    @classmethod
    def problems(cls, arguments: Mapping[str, Any]) -> list[str]:
        """Judge the arguments before the model is built; see `expt.job.Checked`."""
        problem = depth_problem("model.depth", arguments.get("depth", 18))
        found = [problem] if problem else []
        for name in ("stem_kernel", "stem_stride"):
            value = arguments.get(name, (1, 1, 1))
            if len(value) != 3 or min(value) < 1:
                found.append(
                    f"model.{name}={list(value)} must be three numbers from 1: frames, height and "
                    "width"
                )
        return found

    def forward(self, clip: Tensor, keypoints: Tensor | None = None) -> Tensor:
        """Return logits [B, classes] of clips [B,C,T,P,P], of bytes or normalised, and keypoints.

        Keypoints are [B,T,J,D].
        """
        pictures = normalised(clip)
        if self.frame_difference:
            change = nn.functional.pad(pictures.diff(dim=2), (0, 0, 0, 0, 1, 0))
            pictures = torch.cat([pictures, self.frame_difference * change], dim=1)
        features = self.clip(pictures)
        if self.keypoints is not None:
            assert keypoints is not None, "the data give keypoints when the model has a stream"
            features = torch.cat([features, self.keypoints(keypoints)], dim=1)
        logits: Tensor = self.head(features)
        return logits


class KeypointStream(nn.Module):
    """Keypoints over time as one vector: a convolution over frames, then a GRU."""

    def __init__(self, values: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Conv1d(values, width, 3, padding=1), nn.ReLU(inplace=True))
        self.over_time = nn.GRU(width, width, batch_first=True)

    def forward(self, keypoints: Tensor) -> Tensor:
        """Return [B, width] of keypoints [B,T,J,D]."""
        steps = self.embed(keypoints.flatten(2).transpose(1, 2)).transpose(1, 2)
        last: Tensor = self.over_time(steps)[0][:, -1]
        return last
