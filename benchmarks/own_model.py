"""A job as a user would add it: a language model of torch's own layers, on random tokens.

Not part of the package: `--config-dir=benchmarks/own_conf data=tokens model=decoder` finds it, with
`benchmarks` on the path. Its YAML names the length of a sequence as a size that may be smaller.

Letters: `B` sequences, `L` tokens, `V` words.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from expt.job import Batch, Metric, Split

COUNTS: Mapping[Split, int] = {"train": 4096, "val": 64, "test": 64}


class Loss:
    """The mean loss of a token over a whole split."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        self.count = 0

    def update(self, prediction: Tensor, batch: Batch) -> None:
        """Add logits [B,L,V] and targets [B,L]."""
        self.total = self.total + token_loss(prediction, batch.target)
        self.count += batch.target.numel()

    def compute(self) -> dict[str, float]:
        """Return the mean."""
        return {"loss": float(self.total) / self.count}


class Tokens:
    """Random tokens [B,L]; the target is the next one."""

    metrics = (Metric("loss"),)

    def __init__(self, words: int, length: int, batch_size: int, eval_batch_size: int) -> None:
        self.words, self.length = words, length
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size

    def to(self, device: torch.device) -> None:
        """Nothing is kept: tokens follow from their index."""
        self.device = device

    def size(self, split: Split) -> int:
        """Return the number of sequences."""
        return COUNTS[split]

    def gather(self, split: Split, indices: Tensor) -> Batch:
        """Return the sequences of these indices."""
        steps = torch.arange(self.length + 1, device=indices.device)
        found = (indices[:, None] * 7919 + steps * (indices[:, None] % 97 + 1)) % self.words
        return Batch({"tokens": found[:, :-1]}, found[:, 1:])

    def weight(self, split: Split, indices: Tensor) -> Tensor:
        """Return the number of tokens."""
        return torch.tensor(float(len(indices) * self.length), device=indices.device)

    def loss(self, prediction: Tensor, batch: Batch) -> Tensor:
        """Return the summed loss."""
        return token_loss(prediction, batch.target)

    def accumulator(self) -> Loss:
        """Return what evaluation adds up."""
        return Loss()

    def model_arguments(self) -> dict[str, int]:
        """Return what a model may ask for."""
        return {"words": self.words, "length": self.length}

    def fingerprint(self) -> str:
        """Tell sets of other sizes apart."""
        return hashlib.sha256(f"{self.words} {self.length}".encode()).hexdigest()[:16]


class Decoder(nn.Module):
    """Layers of `nn.TransformerEncoder` under a causal mask."""

    def __init__(self, words: int, length: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.places = nn.Parameter(torch.zeros(length, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True,
            norm_first=True,
        )  # fmt: skip
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, words, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B,L] -> logits [B,L,V]."""
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=tokens.device)
        hidden = self.words(tokens) + self.places[:length]
        return self.head(self.layers(hidden, mask=mask, is_causal=True))


def token_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return the summed cross-entropy of logits [B,L,V]."""
    return nn.functional.cross_entropy(
        logits.float().flatten(0, 1), target.flatten(), reduction="sum"
    )
