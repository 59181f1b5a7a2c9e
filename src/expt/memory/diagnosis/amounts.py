"""Amounts of memory in a line or a table's cell: how many bytes, of what, on which device.

A number is an amount of memory if a byte unit follows it (``18.2 GB``) or is part of its name
(``memory_gb``), or if its name is one of memory and its unit a bare ``M`` or ``G``, or, by the
convention of MMEngine and torchvision, none (``memory: 4672`` are MiB). The words next to it must
not name anything else: files, tokens, parameters, rates and the like are never memory, and neither
is a number with words next to it of which none is about memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from expt.units import WRITTEN_NUMBER, WRITTEN_UNIT, written_bytes

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

MOST_PLAUSIBLE = 16 * 1024**4
"""Bytes above which a number is no memory of one machine."""
UNITLESS_MIB = (100, 1024**2)
"""Numbers without a unit that are taken as MiB: below are percentages, above is more than 1 TiB."""
UNITLESS_BYTES = 2**24
"""Numbers without a unit from which on they are taken as bytes."""

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
    r"|for|with|to|and|avg|average|mean|min|size|so|far|already|currently|about|info|debug"
    r"|warning|process|processes|tensors?|torch|pytorch|nvidia|smi|py|main|log(?:ger)?|out|stats"
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
    r"|util\w*|percent\w*|pct|frac|fraction|ratio|temp\w*|power|clock|fan|download\w*|upload\w*"
    r"|queue|episodic|released?|vms"
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
_SEPARATOR = re.compile(
    r"(?<!\d),|,(?!\d{3}(?!\d))|[;|\t{}()\[\]]|(?<![:=\s])\s{2,}|\s[-*\u2013\u2014]\s"
)
_TOKEN = re.compile(
    rf"(?<![\w.\x00+-])(?P<number>{WRITTEN_NUMBER})(?:\s?_?(?P<unit>{WRITTEN_UNIT})(?![\w%]))?"
    r"(?P<rate>\s*(?:/|per\b)\s*(?:s|ms|min|h|it|sec\w*|hour|iter\w*|step|epoch|sample|token)\b)?"
)
_NOT_NOW = re.compile(r"(?:large|small)_pool|\.all\.allocated$")
"""Parts of torch's `memory_stats`: a pool of the whole, and all that was ever allocated."""
_OF = re.compile(r"\s*(?:/|of|out of)\s*")
_WORD = re.compile(r"([^\W\d_]+)(?:\x00(\d+)\x00)?")
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z][a-z])")


@dataclass(frozen=True)
class Amount:
    """Bytes of one kind on one device; the device is "" where nothing names it."""

    count_bytes: int
    role: Role
    device: str
    label: str  # the words that name it
    assumed_unit: str = ""  # "MiB" or "bytes" where the text gives none


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


@dataclass(frozen=True)
class _Token:
    """A number in a text, with its unit, and with the total of ``18.2/24 GB``."""

    number: str
    unit: str
    start: int
    end: int
    is_rate: bool
    total: str = ""


def amounts(line: str) -> list[Amount]:
    """Return every amount of memory in a line; steps and times of day should be cut out before."""
    line = _marked(line)
    context = Label("")
    device = rank = ""
    named: list[Amount] = []
    unnamed: list[Amount] = []
    for part in _SEPARATOR.split(line):
        labelled = list(_labelled(part))
        if not labelled:
            alone = describe(part)
            device, rank = alone.device or device, alone.rank or rank
            context = context if alone.empty and not alone.device else alone
        for token, label in labelled:
            rank = label.rank or rank
            if token.unit or label.unit or label.memory or label.role_word:
                found = _found(token, label, context, (rank, label.device or device))
                says_what = not label.empty or label.device or context.memory
                (named if says_what else unnamed).extend(found)
                device = label.device or device
            if label.foreign or (label.unknown and not label.memory):
                context = Label("")
    known = any(one.role in ("allocated_bytes", "peak_bytes") for one in named)
    return named if known else named + unnamed


def cell_amounts(name: str, value: str, device: str = "") -> list[Amount]:
    """Return the amount in a table's cell or a record's field, with its total if it gives one.

    Args:
        name: of the column or field.
        value: as written, with or without a unit.
        device: what the row is about, if it says so.

    """
    label = name_label(name)
    if not label.about_memory:
        return []
    tokens = _tokens(value)
    if len(tokens) != 1 or tokens[0].start or re.search(r"[^\W_]|%", value[tokens[0].end :]):
        return []
    where = (label.rank, label.device)
    if device:
        where = (device, "" if label.device in device else label.device)
    return _found(tokens[0], label, Label(""), where)


@lru_cache(4096)
def name_label(name: str) -> Label:
    """Return what the name of a column or device says."""
    return describe(_marked(name))


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
        named = _DEVICE_WORDS.get(word, "")
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


def _marked(text: str) -> str:
    """Tell units in brackets and numbers of devices from amounts: they are part of a name."""
    text = _UNIT_IN_CAMEL_CASE.sub("_", _BRACKETED_UNIT.sub(r"_\g<unit>", text))
    return _INDEXED.sub("\\g<kind>\0\\g<index>\0", text)


def _labelled(part: str) -> Iterator[tuple[_Token, Label]]:
    """Yield the numbers of a part of a line, each with the words that belong to it."""
    tokens = _tokens(part)
    if not tokens:
        return
    ends = [0, *(token.end for token in tokens)]
    starts = [*(token.start for token in tokens), len(part)]
    gaps = [describe(part[end:start]) for end, start in zip(ends, starts, strict=True)]
    first, last = gaps[0], gaps[-1]
    words_follow = first.empty and (not last.empty or bool(last.device and not first.device))
    for at, token in enumerate(tokens):
        label = gaps[at + words_follow]
        if words_follow and (first.device or first.rank):
            label = replace(
                label, device=label.device or first.device, rank=label.rank or first.rank
            )
        if not words_follow and token is tokens[-1] and not (last.empty and not last.device):
            # ``used 12.0M tokens``, ``used 8.3 GB GPU``
            foreign = label.foreign or last.foreign or (not label.memory and last.unknown)
            foreign = foreign or not (token.unit or label.unit)  # ``memory: 3 entries``
            label = replace(label, foreign=foreign, device=label.device or last.device)
        yield token, label


def _tokens(text: str) -> list[_Token]:
    tokens: list[_Token] = []
    for found in _TOKEN.finditer(text):
        start, end = found.span()
        after = text[end : end + 1]
        unclear = bool(found["rate"]) or (
            found["unit"] is None and (after.isalpha() or after == "%")
        )
        token = _Token(found["number"], found["unit"] or "", start, end, unclear)
        before = tokens[-1] if tokens else None
        if before and not before.total and _OF.fullmatch(text, before.end, start):
            # 18.2/24 GB, 18.2 GB of 24 GB
            unit = before.unit or token.unit
            tokens[-1] = _Token(
                before.number, unit, before.start, end, unclear, f"{token.number} {token.unit}"
            )
            continue
        tokens.append(token)
    return tokens


def _found(token: _Token, label: Label, context: Label, where: tuple[str, str]) -> list[Amount]:
    """Return the amount that a number is with these words, and its total; nothing if it is none."""
    if token.is_rate or label.foreign or (label.empty and context.foreign):
        return []
    if not (label.about_memory or (label.empty and not label.unknown)):
        return []
    unit, assumed = _unit(token, label, context)
    if unit is None:
        return []
    device = " ".join(part for part in where if part)
    role = context.role if label.empty and context.memory else label.role
    second: Role = "total_bytes"
    if token.total and "/" in label.text:  # ``allocated/reserved: 8.3/20.1 GB``
        first, _, after = label.text.rpartition("/")
        role, named = describe(first).role, describe(after).role
        second = named if named != role else second
    own = Amount(written_bytes(token.number, unit), role, device, label.text, assumed)
    found = [own]
    if token.total:
        number, total_unit = token.total.split(" ")
        count = written_bytes(number, total_unit or unit)
        found.append(Amount(count, second, device, label.text, assumed))
    return found if own.count_bytes <= MOST_PLAUSIBLE else []


def _unit(token: _Token, label: Label, context: Label) -> tuple[str | None, str]:
    """Return the unit of a number, None if it cannot be memory, and the unit if it is assumed."""
    unit = token.unit
    if len(unit) == 1:
        if unit == "B":
            clear = label.memory and token.number.isdigit()
        else:
            in_use = "use" in label.text.lower() or bool(describe(label.text).device)
            clear = label.memory or context.memory or (unit == "G" and in_use)
        return (unit if clear else None), ""
    if unit:
        is_bits = unit[0].isupper() and unit.endswith("b") and not unit[1:].startswith("i")
        return (None if is_bits and not label.memory else unit), ""
    if label.unit:
        return label.unit, ""
    if context.memory and context.unit and not label.empty:
        return context.unit, ""
    return _assumed_unit(token, label)


def _assumed_unit(token: _Token, label: Label) -> tuple[str | None, str]:
    """Return the unit of ``memory: 4672`` by convention."""
    if (
        not label.memory
        or label.unknown
        or not re.search(r"mem|ram|rss|显存|内存", label.text, re.I)
    ):
        return None, ""
    number = float(token.number.replace(",", ""))
    if UNITLESS_MIB[0] <= number <= UNITLESS_MIB[1]:
        return "MiB", "MiB"
    if number >= UNITLESS_BYTES and number.is_integer():
        return "bytes", "bytes"
    return None, ""
