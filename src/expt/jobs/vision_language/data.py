"""Instructions about pictures, generated: for plans of a stated size, and for measurements.

A picture has one of eight colours, and the question is a line of words. Each word of the answer is
the word of the question in its place, moved on by the number of the colour: neither the picture nor
the question alone tells it. Nothing is read; batch, tokens and pixels are settings.

Letters: `B` samples, `C` pictures of a sample, `P` pixels, `T` tokens, `V` words.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from expt.errors import ModelError
from expt.job import Batch, Metric, Split

COLOURS, FIRST = 8, 3
"""Colours of pictures, which is also how many words there are; the first word, after the tokens
that begin, end and pad a sentence in most vocabularies."""
UNSAID = -100
"""Target of a token that is not to be learned, as `torch.nn.functional.cross_entropy` has it."""


class GeneratedInstructions:
    """Pictures, a question about each, and its answer; implements `expt.job.StreamedDataSet`.

    Args:
        pixels: of a side of a picture, P.
        tokens: of question and answer together, T; half of them are the answer.
        images: pictures of a sample, C, all of one colour.
        samples: in the training part; a quarter as many validate, and as many test.
        batch_size: samples of an optimizer step.
        eval_batch_size: samples of a forward pass in evaluation.
        seed: of all samples.

    """

    metrics: Sequence[Metric] = (
        Metric("loss", label="cross-entropy"),
        Metric("accuracy", "max", "accuracy", percent=True),
    )

    def __init__(
        self,
        pixels: int = 336,
        tokens: int = 64,
        images: int = 1,
        samples: int = 256,
        batch_size: int = 8,
        eval_batch_size: int = 8,
        seed: int = 0,
    ) -> None:
        self.pixels, self.tokens, self.images, self.samples = pixels, tokens, images, samples
        self.batch_size, self.eval_batch_size, self.seed = batch_size, eval_batch_size, seed

    @classmethod
    def problems(cls, arguments: Mapping[str, Any]) -> list[str]:
        """Return one message per size out of range."""
        least = {"pixels": 1, "tokens": 2, "images": 1, "samples": 4}
        found = [
            f"data.{name} must be at least {lowest}, got {arguments[name]}"
            for name, lowest in least.items()
            if arguments.get(name, lowest) < lowest
        ]
        if arguments.get("tokens", 2) % 2:
            found.append(f"data.tokens must be even, half is the answer, got {arguments['tokens']}")
        return found

    def size(self, split: Split) -> int:
        """Return the number of samples in a split."""
        return self.samples if split == "train" else max(self.samples // 4, 1)

    def model_arguments(self) -> Mapping[str, Any]:
        """Return nothing: the model's sizes do not depend on the data."""
        return {}

    def item(self, split: Split, index: int, generator: torch.Generator) -> Batch:
        """Return one sample: images [C,3,P,P], tokens [T], and the tokens to be said [T]."""
        number = ("train", "val", "test").index(split) + 3 * index
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        colour = int(torch.randint(COLOURS, (), generator=draw))
        question = torch.randint(COLOURS, (self.tokens // 2,), generator=draw)
        answer = (question + colour) % COLOURS
        channels = torch.tensor([255 * (colour >> bit & 1) for bit in range(3)], dtype=torch.uint8)
        picture = channels.view(1, 3, 1, 1).expand(self.images, 3, self.pixels, self.pixels)
        inputs = {"images": picture.clone(), "tokens": FIRST + torch.cat([question, answer])}
        unsaid = torch.full_like(question, UNSAID)
        return Batch(inputs, torch.cat([unsaid, FIRST + answer]))

    def example(self, split: Split, count: int) -> Batch:
        """Return a batch of the shapes of all."""
        shape = (count, self.images, 3, self.pixels, self.pixels)
        inputs = {
            "images": torch.zeros(shape, dtype=torch.uint8),
            "tokens": torch.full((count, self.tokens), FIRST),
        }
        return Batch(inputs, torch.full((count, self.tokens), FIRST))

    def batch_weight(self, batch: Batch) -> Tensor:
        """Return how many tokens are to be said."""
        return (batch.target[:, 1:] != UNSAID).sum()

    def loss(self, prediction: Tensor, batch: Batch) -> Tensor:
        """Return the cross-entropy of the words that are to be said, summed.

        Args:
            prediction: logits [B,T,V] of the word that follows each token.
            batch: with tokens [B,T].

        Raises:
            ModelError: the logits are of other tokens.

        """
        logits, words = _paired(prediction, batch)
        return F.cross_entropy(logits.float(), words, ignore_index=UNSAID, reduction="sum")

    def accumulator(self) -> Said:
        """Return a new accumulator of `metrics`."""
        return Said()

    def fingerprint(self) -> str:
        """Return a short hash of what the samples follow from."""
        values = [self.pixels, self.tokens, self.images, self.samples, self.seed]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


class Said:
    """Cross-entropy and accuracy of the words that were to be said, over all samples."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # loss, right words, words

    def update(self, prediction: Tensor, batch: Batch) -> None:
        """Add logits [B,T,V]."""
        logits, words = _paired(prediction, batch)
        said = words != UNSAID
        loss = F.cross_entropy(logits.float(), words, ignore_index=UNSAID, reduction="sum")
        right = ((logits.argmax(dim=-1) == words) & said).sum()
        sums = torch.stack([loss, right.to(loss.dtype), said.sum().to(loss.dtype)])
        self._sums = sums if self._sums is None else self._sums + sums

    def compute(self) -> dict[str, float]:
        """Return the means over words."""
        assert self._sums is not None, "no batch was added"
        loss, right, count = self._sums.tolist()
        return {"loss": loss / count, "accuracy": right / count}


def _paired(prediction: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return logits [n,V] and the words [n] that they are of."""
    target = batch.target
    if prediction.ndim != 3 or prediction.shape[:2] != target.shape:
        raise ModelError(
            f"the model returned {list(prediction.shape)}, expected logits "
            f"{[*target.shape, 'words']} of the word that follows each token"
        )
    return prediction[:, :-1].flatten(0, 1), target[:, 1:].flatten()
