"""`Demonstrations`: what a robot saw and was told, and the next actions of who showed it.

A sample is a step of an episode: state, sentence, pictures, and the chunk of actions that begins
there. Episodes are divided, never steps; states and actions are normalised by the training part.
All randomness of a sample (the noise and the level of a diffusion or flow, an augmentation) is
drawn from its generator, so that it is the same in any micro-batch, on any rank and after a resume.

Letters: `S` values of a state, `A` of an action, `H` steps of a chunk, `K` candidates, `T` tokens,
`V` cameras, `P` pixels of a side.
"""

from __future__ import annotations

import copy
import hashlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expt.errors import DataError
from expt.job import Batch, Split
from expt.jobs.vla.augment import augmented
from expt.jobs.vla.episodes import Array, arranged, chosen_cameras, of_tasks
from expt.jobs.vla.footage import Footage
from expt.jobs.vla.metrics import ActionErrors, action_metrics, chosen
from expt.jobs.vla.predictions import write_actions
from expt.jobs.vla.sources import open_recordings
from expt.units import format_bytes

SPLITS: tuple[Split, ...] = ("train", "val", "test")
LEAST = 3
"""Demonstrations that can be divided: one to train, validate and test each."""
MOVES = 1e-6
"""Standard deviation, relative to the mean's size, from which on a value is one that moves."""
FARTHEST = 10.0
"""Standard deviations that a state is limited to: where a policy errs it meets unseen ones."""


class Demonstrations:
    """Steps of demonstrations; implements `expt.job.StreamedDataSet`.

    Args:
        path: a packed file (``expt://NAME`` is shipped), a folder of `expt.jobs.vla.demonstrate`,
            or a LeRobot folder, of version 2.1 or 3.0.
        chunk: actions that are predicted at a time, H.
        batch_size: samples per optimizer step.
        eval_batch_size: samples per forward pass in evaluation.
        tasks: whose demonstrations are used; None: all.
        cameras: whose pictures are used; None: all that there are; an empty list: none.
        pixels: of a side of a picture, P; pictures of other sides are squeezed.
        samples: candidates that evaluation draws noise for, K.
        tokenizer: the model's backbone, whose tokens sentences become; None: there are no tokens.
        val_fraction, test_fraction: of the episodes of each task; tasks with fewer than three are
            divided by lot.
        stride: steps from one sample of an episode to the next.
        augmentation: shift training pictures and change their light a little, by lot.
        cache: folder for frames of videos, decoded once.
        where_to_get: said when there is nothing at `path`.
        transforms: what `transforms` of the training's data returned, to predict with its model.

    Raises:
        DataError: there is nothing to read, it is damaged, or it does not fit the settings.

    """

    prediction_formats = ("npz", "parquet")

    def __init__(
        self,
        path: str | None,
        chunk: int,
        batch_size: int,
        eval_batch_size: int,
        tasks: Sequence[str] | None = None,
        cameras: Sequence[str] | None = None,
        pixels: int = 64,
        samples: int = 1,
        tokenizer: Any = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        stride: int = 1,
        augmentation: bool = False,
        cache: str = "outputs/cache",
        where_to_get: str = "Give a LeRobot folder as data.path=FOLDER.",
        transforms: Mapping[str, Any] | None = None,
    ) -> None:
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.chunk, self.pixels, self.samples, self.stride = chunk, pixels, samples, stride
        self.tokenizer, self.augments = tokenizer, augmentation
        self.shown = str(path)
        self.recordings = open_recordings(path, pixels, Path(cache), where_to_get)
        if transforms is not None:
            self.recordings = arranged(self.recordings, transforms, self.shown)
        self.cameras = self._chosen_cameras(cameras, transforms)
        if self.cameras and self.recordings.pixels not in (None, pixels):
            raise DataError(
                f"data.pixels={pixels}: the pictures of {self.shown} were drawn with "
                f"{self.recordings.pixels} pixels of a side; data.pixels={self.recordings.pixels} "
                "takes them as they are"
            )
        self.numbers = of_tasks(self.recordings, tasks)
        self._without: frozenset[str] = frozenset()
        self._decoding = self._check_frames()
        self._divide(self.numbers, val_fraction, test_fraction, transforms)
        self._normalise(transforms)
        self.sentences = list(
            dict.fromkeys(self.recordings.episodes[number].sentence for number in self.numbers)
        )
        self._tokens = self._tokenised(self.sentences)
        self.metrics = action_metrics(self.recordings.action_names, samples)

    @classmethod
    def problems(cls, arguments: Mapping[str, Any]) -> list[str]:
        """Judge the arguments before any file is read; see `expt.job.Checked`."""
        least = {
            "chunk": 1, "batch_size": 1, "eval_batch_size": 1, "samples": 1, "stride": 1,
            "pixels": 8,
        }  # fmt: skip
        found = [
            f"data.{name} must be at least {limit}, got {arguments[name]}"
            for name, limit in least.items()
            if isinstance(arguments.get(name), int) and arguments[name] < limit
        ]
        found += [
            f"data.{name} is null; give a number, like data.{name}={limit}"
            for name, limit in {**least, "pixels": 224}.items()
            if name in arguments and arguments[name] is None
        ]
        val, test = arguments.get("val_fraction", 0.1), arguments.get("test_fraction", 0.1)
        if not (val > 0 and test > 0 and val + test < 1):
            found.append(
                "data.val_fraction and data.test_fraction must be positive and leave a part for "
                f"training, got {val} and {test}"
            )
        return found

    def size(self, split: Split) -> int:
        """Return the number of samples."""
        return int(self._starts[split][-1])

    def item(self, split: Split, index: int, generator: torch.Generator) -> Batch:
        """Read a step: inputs by the names that `example` has, target [H, A] with NaN at the end.

        ``actions`` is the target itself, normalised like it, for training's noisy input; it is
        absent from other splits, whose models cannot look at it by mistake.
        """
        number, step = self._place(split, index)
        episode = self.recordings.episodes[number]
        shape = (1 if split == "train" else self.samples, self.chunk, len(self.action_mean))
        inputs = {
            "state": torch.from_numpy(self.normalised(episode.state[step])),
            "noise": torch.randn(shape, generator=generator),
            "level": torch.rand((), generator=generator),
        }
        target = torch.full(shape[1:], torch.nan)
        known = episode.action[step : step + self.chunk]
        target[: len(known)] = torch.from_numpy((known - self.action_mean) / self.action_std)
        if split == "train":
            inputs["actions"] = target.nan_to_num(nan=0.0)
        if self._tokens is not None and "tokens" not in self._without:
            inputs["tokens"] = self._tokens[self.sentences.index(episode.sentence)]
        if self.cameras and "images" not in self._without:
            assert self.recordings.frames is not None
            images = torch.from_numpy(self.recordings.frames.read(number, step, self.cameras))
            if self.augments and split == "train":
                images = augmented(images, generator)
            inputs["images"] = images
        return Batch({k: v for k, v in inputs.items() if k not in self._without}, target)

    def example(self, split: Split, count: int) -> Batch:
        """Return a batch of the right shapes; nothing is read."""
        inputs = self.blank(split, count)
        target = torch.zeros((count, self.chunk, len(self.action_mean)))
        return Batch({k: v for k, v in inputs.items() if k not in self._without}, target)

    def blank(self, split: Split, count: int) -> dict[str, Tensor]:
        """Return all inputs of `count` samples, without values."""
        size = len(self.action_mean)
        inputs = {
            "state": torch.zeros((count, len(self.state_mean))),
            "noise": torch.zeros(
                (count, 1 if split == "train" else self.samples, self.chunk, size)
            ),
            "level": torch.zeros(count),
        }
        if split == "train":
            inputs["actions"] = torch.zeros((count, self.chunk, size))
        if self._tokens is not None:
            inputs["tokens"] = self._tokens[:1].expand(count, -1).clone()
        if self.cameras:
            side = (self.pixels, self.pixels)
            inputs["images"] = torch.zeros((count, len(self.cameras), 3, *side), dtype=torch.uint8)
        return inputs

    def without(self, inputs: Iterable[str]) -> Demonstrations:
        """Return the same data that do not read some inputs, which something else stands for."""
        other = copy.copy(self)
        other._without = self._without | frozenset(inputs)
        return other

    def sample_name(self, split: Split, index: int) -> str:
        """Return where a sample comes from."""
        number, step = self._place(split, index)
        return f"step {step} of {self.recordings.episodes[number].name} in {self.shown}"

    def model_arguments(self) -> Mapping[str, Any]:
        """Return what a model may ask for by name."""
        return {
            "action_size": len(self.action_mean),
            "state_size": len(self.state_mean),
            "chunk": self.chunk,
            "cameras": len(self.cameras),
            "pixels": self.pixels,
            "num_tokens": 0 if self._tokens is None else self._tokens.shape[1],
        }

    def loss(self, prediction: Tensor, batch: Batch) -> Tensor:
        """Return the squared error of normalised actions, summed over what is known."""
        error = chosen(prediction, batch).float() - batch.target
        return torch.where(batch.target.isfinite(), error, 0.0).square().sum()

    def batch_weight(self, batch: Batch) -> Tensor:
        """Return how many entries are known, at least 1."""
        return batch.target.isfinite().sum().clamp(min=1).float()

    def accumulator(self) -> ActionErrors:
        """Return an accumulator in the actions' own units."""
        std = torch.from_numpy(self.action_std)
        return ActionErrors(std, self.recordings.action_names, self.samples)

    def transforms(self) -> Mapping[str, Any]:
        """Return what acting needs of the training part; see `expt.job.Transformed`."""
        return {
            "state_mean": self.state_mean,
            "state_std": self.state_std,
            "action_mean": self.action_mean,
            "action_std": self.action_std,
            "state_names": [str(name) for name in self.recordings.state_names],
            "action_names": [str(name) for name in self.recordings.action_names],
            "cameras": list(self.cameras),
        }

    def normalised(self, state: Array) -> Array:
        """Return states [..., S] in standard deviations; 0 where a value does not move."""
        moved = (state - self.state_mean) / np.where(self.state_std > 0, self.state_std, np.inf)
        return np.clip(moved, -FARTHEST, FARTHEST).astype(np.float32)

    def in_own_units(self, actions: Array) -> Array:
        """Return normalised actions [..., A] as the robot takes them."""
        return actions * self.action_std + self.action_mean

    def tokens_of(self, sentences: Sequence[str]) -> Tensor | None:
        """Return sentences as tokens [N, T], -1 behind the shorter; None without a tokenizer."""
        if self._tokens is None:
            return None
        if set(sentences) <= set(self.sentences):
            return self._tokens[[self.sentences.index(sentence) for sentence in sentences]]
        return self._tokenised(sentences)

    def write_predictions(
        self, split: Split, predictions: Tensor, indices: Tensor, path: Path
    ) -> None:
        """Write the actions [B, H, A] of a split's samples, beside those that were demonstrated."""
        one = predictions[:, 0] if predictions.dim() == 4 else predictions
        places = [self._place(split, int(index)) for index in indices]
        shown = np.full(one.shape, np.nan, dtype=np.float32)
        for row, (number, step) in zip(shown, places, strict=True):
            known = self.recordings.episodes[number].action[step : step + self.chunk]
            row[: len(known)] = known
        write_actions(
            path,
            [str(name) for name in self.recordings.action_names],
            {
                "episode": np.array([self.recordings.episodes[n].name for n, _ in places]),
                "step": np.array([step for _, step in places]),
                "predicted": self.in_own_units(one.numpy()),
                "demonstrated": shown,
            },
        )

    def fingerprint(self) -> str:
        """Return a short hash of the values, their parts, and how samples are made of them."""
        told: list[Any] = [self.recordings.digest(), *self.cameras]
        told += [self.pixels, self.chunk, self.stride]
        told += [f"{split} {self.parts[split]}" for split in SPLITS]
        told += [] if self._tokens is None else self._tokens.tolist()
        if isinstance(self.recordings.frames, Footage):
            told += self.recordings.frames.sizes(self.numbers, self.cameras)
        return hashlib.sha256("\n".join(map(str, told)).encode()).hexdigest()[:16]

    def describe(self) -> str:
        """Return a line of facts, and one per thing that a user should know."""
        sizes = " / ".join(str(len(self.parts[split])) for split in SPLITS)
        steps = sum(self.size(split) for split in SPLITS)
        seen = (
            f"pictures of {', '.join(self.cameras)} with {self.pixels} x {self.pixels} pixels"
            if self.cameras
            else "no pictures"
        )
        told = f"{len(self.sentences)} sentence{'s' if len(self.sentences) > 1 else ''}"
        line = (
            f"{Path(self.shown).name}: {sizes} demonstrations to train, validate and test, "
            f"{steps} samples, {told}; state of {len(self.state_mean)}, {seen}; chunks of "
            f"{self.chunk} actions of {len(self.action_mean)}, "
            f"{self.chunk / self.recordings.frames_per_second:.2g} s"
        )
        notes = [f"note: {note}" for note in self.recordings.notes]
        return "\n".join([line, *([self._decoding] if self._decoding else []), *notes])

    def _place(self, split: Split, index: int) -> tuple[int, int]:
        """Return the episode and the step of a sample."""
        starts = self._starts[split]
        place = int(np.searchsorted(starts, index, side="right")) - 1
        return self.parts[split][place], int(index - starts[place]) * self.stride

    def _chosen_cameras(
        self, cameras: Sequence[str] | None, transforms: Mapping[str, Any] | None
    ) -> list[str]:
        """Return the cameras, to predict those of the training unless others are named."""
        trained = None if transforms is None else transforms.get("cameras")
        found = chosen_cameras(self.recordings, trained if cameras is None else cameras, self.shown)
        if trained is not None and len(found) != len(trained):
            raise DataError(
                f"data.cameras={found}: the model was trained with pictures of {len(trained)} "
                f"cameras, {list(trained)}; name as many, in that order"
            )
        return found

    def _check_frames(self) -> str:
        """Look at the files of pictures before training does; return what will be decoded.

        Raises:
            DataError: one is missing or damaged, or the disk has no room for what is decoded.

        """
        frames = self.recordings.frames
        if not isinstance(frames, Footage) or not self.cameras:
            return ""
        frames.check(self.numbers, self.cameras)
        needed = frames.missing_bytes(self.numbers, self.cameras)
        existing = next(p for p in (frames.folder, *frames.folder.absolute().parents) if p.exists())
        free = shutil.disk_usage(existing).free
        if needed > free:
            raise DataError(
                f"the decoded pictures take {format_bytes(needed)}, and {frames.folder} has "
                f"{format_bytes(free)}; data.cache=FOLDER keeps them elsewhere, and fewer "
                "data.cameras or data.pixels take less"
            )
        return f"pictures are decoded once into {frames.folder}: {format_bytes(needed)} to go"

    def _divide(
        self, numbers: Sequence[int], val: float, test: float, transforms: Mapping[str, Any] | None
    ) -> None:
        """Give each task's episodes to the parts; to predict, all are of the test.

        A hash of an episode's names says where it stands among those of its task, so that its part
        does not depend on what other tasks there are. In a task too small to be divided, the hash
        says the part itself, but where all tasks are small and would leave a part empty.
        """
        self.parts: dict[Split, list[int]] = {split: [] for split in SPLITS}
        if transforms is not None:
            self.parts["test"] += numbers
        elif len(numbers) < LEAST:
            raise DataError(
                f"{self.shown} has {len(numbers)} demonstrations of these tasks; to train, "
                f"validate and test takes at least {LEAST}"
            )
        else:
            self._divide_tasks(numbers, val, test)
        self._starts: dict[Split, Array] = {}
        for split in SPLITS:
            self.parts[split].sort()
            counts = [
                -(-len(self.recordings.episodes[number]) // self.stride)
                for number in self.parts[split]
            ]
            self._starts[split] = np.cumsum([0, *counts])

    def _divide_tasks(self, numbers: Sequence[int], val: float, test: float) -> None:
        by_task: dict[str, list[int]] = {}
        for number in sorted(numbers, key=self._mixed):
            by_task.setdefault(self.recordings.episodes[number].task, []).append(number)
        for order in by_task.values():
            if len(order) >= LEAST:
                tested = min(max(round(test * len(order)), 1), len(order) - 2)
                held = tested + min(max(round(val * len(order)), 1), len(order) - tested - 1)
                self.parts["test"] += order[:tested]
                self.parts["val"] += order[tested:held]
                self.parts["train"] += order[held:]
                continue
            for number in order:
                place = int(self._mixed(number), 16) / 16 ** len(self._mixed(number))
                split: Split = "test" if place < test else "val" if place < test + val else "train"
                self.parts[split].append(number)
        for split in SPLITS:
            if not self.parts[split]:
                largest = max(self.parts.values(), key=len)
                self.parts[split].append(largest.pop(0))

    def _mixed(self, number: int) -> str:
        """Return a key that orders episodes as if at random, the same everywhere."""
        episode = self.recordings.episodes[number]
        return hashlib.sha256(f"{episode.task}/{episode.name}".encode()).hexdigest()

    def _normalise(self, transforms: Mapping[str, Any] | None) -> None:
        """Take mean and standard deviation from the training part, or from where they were kept."""
        if transforms is None:
            episodes = [self.recordings.episodes[number] for number in self.parts["train"]]
            self.state_mean, self.state_std = _moments(np.concatenate([e.state for e in episodes]))
            mean, std = _moments(np.concatenate([e.action for e in episodes]))
            self.action_mean, self.action_std = mean, np.where(std > 0, std, 1).astype(np.float32)
            return
        for name, names in (
            ("state", self.recordings.state_names), ("action", self.recordings.action_names),
        ):  # fmt: skip
            for moment in ("mean", "std"):
                kept = np.asarray(transforms[f"{name}_{moment}"], dtype=np.float32)
                if len(kept) != len(names):
                    raise DataError(
                        f"{self.shown} has {name}s of {len(names)} values, and the model was "
                        f"trained with {len(kept)}"
                    )
                setattr(self, f"{name}_{moment}", kept)

    def _tokenised(self, sentences: Sequence[str]) -> Tensor | None:
        if self.tokenizer is None:
            return None
        from expt.jobs.vla.text import sentence_tokens

        return sentence_tokens(self.tokenizer, sentences)


def _moments(values: Array) -> tuple[Array, Array]:
    """Return mean and standard deviation of the columns [N, ...]; 0 of one that does not move."""
    exact = values.astype(np.float64)
    mean, std = exact.mean(axis=0), exact.std(axis=0)
    moves = std > MOVES * np.maximum(np.abs(mean), 1.0)
    return mean.astype(np.float32), np.where(moves, std, 0.0).astype(np.float32)
