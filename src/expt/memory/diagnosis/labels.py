"""What the words next to a number in a log, or the name of a column, say about it.

The vocabulary is closed for memory and open for the rest: a word that is not known is none of
memory. Words for memory itself are enough to read a bare ``G``; words for a role such as "used" or
"peak", and names of devices, only count where no other word stands beside them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

Role = Literal[
    "allocated_bytes",
    "reserved_bytes",
    "peak_bytes",
    "peak_reserved_bytes",
    "unused_bytes",  # reserved without a tensor in it
    "free_bytes",
    "total_bytes",
    "other_bytes",  # of other processes
]

_MEMORY_WORDS = re.compile(
    r"(?:gpu|cuda|max|v|peak)?mem(?:ory|ories)?(?:used|usage|alloc\w*)?|v?ram|hbm|(?:max|vm)?rss"
    r"|uss|pss|heap|alloc\w*|reserved|resident|footprint|speicher|mémoire|память|显存|内存|メモリ"
)
_ROLE_WORDS = re.compile(
    r"used?|usages?|peak|max|maximum|total|free|available|avail|remaining|cached?|pool|current|cur"
    r"|active|others?|limit|budget|capacity|consum\w+|ma|ca"
)
_DEVICE_WORDS = {
    **dict.fromkeys(("gpu", "gpus", "cuda", "vram", "hbm", "hip", "rocm", "gpumem"), "GPU"),
    **dict.fromkeys(("cudamem", "card"), "GPU"),
    **{name: name.upper() for name in ("npu", "xpu", "mps", "tpu", "hpu", "mlu")},
    **dict.fromkeys(("cpu", "host", "ram", "rss", "maxrss", "vmrss", "uss", "pss"), "CPU"),
    **dict.fromkeys(("system", "sys", "resident"), "CPU"),
}
_RANK_WORDS = ("rank", "default", "worker", "node", "device")
"""Words of a process or card that count only with a number; torchrun writes ``[default0]:``."""
_NEUTRAL_WORDS = re.compile(
    r"steps?|iter(?:ation)?s?|it|epochs?|batch|train(?:ing|er)?|val(?:id|idation)?|eval\w*|rank"
    r"|local|global|node|worker|device|default|at|on|in|of|is|was|are|now|after|before|the|an?|by"
    r"|for|with|to|and|avg|average|mean|min|so|far|already|currently|about|info|debug"
    r"|warning|process|processes|tensors?|torch|pytorch|nvidia|smi|py|main|log(?:ger)?|out|stats|util\w*"
)
_FOREIGN_WORDS = re.compile(
    r"lr|rates?|tok(?:en)?s?|samples?|examples?|im(?:a)?gs?|images?|seqs?|sequences?|frames?"
    r"|params?|parameters?|weights?|[a-z]?flops?|macs|ops|mfu|hfu|speed|throughput|tps|qps|fps"
    r"|time|secs?|seconds?|eta|elapsed|checkpoints?|ckpts?|files?|data|datasets?|storage|loss"
    r"|acc|accuracy|len|length|bank|slots?|grads?|gradients?|norm|writ\w+|reads?|reading|sent"
    r"|receiv\w+|recv|transfer\w*|traffic|network|net|io|artifacts?|vocab\w*|words?|chars?"
    r"|doc(?:ument)?s?|rows?|records?|requests?|hours?|cost|shards?|buckets?|scores?|err(?:or)?s?"
    r"|hits?|miss(?:es)?|entries|items|objects?|events?|ooms?|retries|cuts?|logs|model|batches"
)
_NEVER_WORDS = re.compile(
    r"saved?|saves|savings?|saving|freed|delta|diff|increase\w*|growth|grew|change\w*|estimat\w+"
    r"|predict\w+|expect\w+|replay|bandwidth|bw|swap\w*|disks?|bus|pcie|nvlink|nums?|number|counts?"
    r"|percent\w*|pct|frac|fraction|ratio|temp\w*|power|clocks?|fan|download\w*|upload\w*"
    r"|queue|shared|episodic|released?|vms"
)
"""Words that rule memory out wherever they stand; the others only right before the number."""

_INDEXED = re.compile(
    r"(?<![a-zA-Z])(?P<kind>gpus?|cuda|npu|xpu|tpu|hpu|mlu|hip|card|device|rank|default|worker"
    r"|node)\s*[:#_=.\[-]?\s*(?P<index>\d{1,3})(?!\d)\]?"
    r"(?!\.\d)(?!\.?\d*\s*(?:[KMGTP]i?B|[KMGT]\b|%|[kmgt]i?b\b|bytes))",
    re.IGNORECASE,
)
_BRACKETED_UNIT = re.compile(r"[(\[]\s*(?:in )?(?P<unit>[kmgtp]i?b|bytes)\s*[)\]]", re.IGNORECASE)
_UNIT_IN_CAMEL_CASE = re.compile(r"(?<=[a-z])(?=(?:[KMGT]i?B|Bytes)(?![A-Za-z]))")
_NAMED_UNIT = re.compile(r"(?:^|(?<=[\W_]))(?P<unit>[kmgtp]i?b|bytes)(?=$|[\W_])", re.IGNORECASE)
_NOT_NOW = re.compile(r"(?:large|small)_pool|\.all\.allocated$")
"""Parts of torch's `memory_stats`: a pool of the whole, and all that was ever allocated."""
_WORD = re.compile(r"([^\W\d_]+)(?:\x00(\d+)\x00)?")
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z][a-z])")


@dataclass(frozen=True)
class Label:
    """What the words next to a number say."""

    text: str
    role: Role = "allocated_bytes"
    device: str = ""
    rank: str = ""
    unit: str = ""  # of a name such as ``memory_gb``
    memory: bool = False  # a word for memory itself
    role_word: bool = False  # a word such as "used" or "peak"
    foreign: bool = False  # a word for something else has the last say
    unknown: bool = False

    @property
    def empty(self) -> bool:
        """Whether nothing says what the number is; a device alone does not."""
        return not (self.memory or self.role_word or self.foreign or self.unknown)

    @property
    def about_memory(self) -> bool:
        """Whether a number with a byte unit and these words is memory."""
        if self.memory or self.foreign:
            return not self.foreign
        return (self.role_word or bool(self.device)) and not self.unknown


@lru_cache(4096)
def name_label(name: str) -> Label:
    """Return what the name of a column or device says."""
    return describe(marked(name))


@lru_cache(4096)
def describe(text: str) -> Label:
    """Return what a name, or the words before or after a number, say about it."""
    unit = next((found["unit"] for found in _NAMED_UNIT.finditer(text)), "")
    rest = _NAMED_UNIT.sub(" ", text) if unit else text
    words: list[str] = []
    device = rank = ""
    memory = role_word = foreign = never = unknown = False
    for word, index in _WORD.findall(_CAMEL.sub(" ", rest)):
        word = word.lower()
        words.append(word)
        if word in _RANK_WORDS and index:
            rank = f"{'rank' if word == 'default' else word} {index}"
        named = _DEVICE_WORDS.get(word, "GPU" if word == "device" and not index else "")
        if named and (not device or device == "CPU"):
            device = f"{named} {index}" if index else named
        if _MEMORY_WORDS.fullmatch(word):
            memory, foreign = True, False
        elif _NEVER_WORDS.fullmatch(word):
            never = True
        elif _FOREIGN_WORDS.fullmatch(word):
            foreign = True
        elif _ROLE_WORDS.fullmatch(word):
            role_word = True
        elif not named and not _NEUTRAL_WORDS.fullmatch(word):
            unknown = True
    if "%" in rest or _NOT_NOW.search(rest):
        never = True
    return Label(
        " ".join(text.replace("\0", "").split()).strip(" :=_-"),
        _role(set(words)),
        device,
        rank,
        unit,
        memory,
        role_word,
        foreign or never,
        unknown,
    )


def _role(words: set[str]) -> Role:
    """Return what an amount of memory with these words is."""
    is_peak = bool(words & {"peak", "max", "maximum", "maxmem", "peakmem", "maxrss", "water"})
    in_use = any(re.match(r"alloc|used?$|usage|active|consum|resident|rss|ma$", w) for w in words)
    if words & {"other", "others"}:
        return "other_bytes"
    if words & {"free", "available", "avail", "remaining"}:
        return "free_bytes"
    if words & {"unallocated"}:
        return "unused_bytes"
    if words & {"reserved", "res", "cached", "cache", "pool", "ca"}:
        return "peak_reserved_bytes" if is_peak else "reserved_bytes"
    if words & {"limit", "budget", "capacity", "allowed"} or ("total" in words and not in_use):
        return "total_bytes"
    return "peak_bytes" if is_peak else "allocated_bytes"


def marked(text: str) -> str:
    """Tell units in brackets and numbers of devices from amounts: they are part of a name."""
    text = _UNIT_IN_CAMEL_CASE.sub("_", _BRACKETED_UNIT.sub(r"_\g<unit>", text))
    return _INDEXED.sub("\\g<kind>\0\\g<index>\0", text)
