"""What to do, in the order in which to try it; every setting that is named here exists.

The order is the handbook's: smaller batch with accumulation, checkpointing (for 12 layers or
more), mixed precision, fused attention, freezing parts, CPU offload, model parallelism.
"""

from __future__ import annotations

from collections.abc import Sequence

from expt.memory.diagnosis.oom_figures import Cause
from expt.memory.diagnosis.oom_wordings import Kind
from expt.memory.diagnosis.trend import Forecast, Trend
from expt.units import GIB

SMALLER_BATCH = (
    "A smaller batch with accumulation: double memory.gradient_accumulation (=2, =4, …); the batch "
    "and the gradients stay the same, the activations halve each time"
)
REMEDIES = (
    SMALLER_BATCH,
    "Activation checkpointing: memory.activation_checkpointing=true; pays for deep models (12 "
    "layers or more), hardly for tiny ones; about a third more time",
    "Mixed precision: memory.precision=bf16 (fp16 on cards without bf16); halves the activations",
    "Fused attention: torch.nn.functional.scaled_dot_product_attention in place of a matrix of "
    "weights; memory then grows with the length, not with its square",
    "Freeze parts of the model (requires_grad_(False)): frozen weights need no gradient and no "
    "optimizer state",
    "Offload to the CPU what is seldom used: frozen weights (memory.weight_offload=true), "
    "optimizer state; or keep what a frozen part makes of a sample (memory.feature_cache=prefix)",
    "Model parallelism: share the model over several cards",
    "Where the optimizer's step is the peak, a fused one (optimizer=adamw; AdamW(fused=True) of "
    "torch): a step by foreach makes copies as large as all weights",
    "A smaller model: memory=lite, memory=minimal",
)
LEAK = (
    "The loss is kept with its graph: add up loss.detach() or float(loss), not loss",
    "Tensors are appended to a list that outlives the step (losses, predictions, features): append "
    "x.detach().cpu(), or a number",
    "Hooks are registered in every step and never removed: call remove() on what "
    "register_forward_hook returns",
    "A cache grows without bound (a dict of features or frames): give it a largest size",
    "retain_graph=True, or a hidden state carried into the next step without detach()",
    "To find the line: torch.cuda.memory._record_memory_history() for a few steps, then "
    "_dump_snapshot() and pytorch.org/memory_viz",
    "Until it is found: checkpoint often (trainer.checkpoint_every_steps=100) and go on with "
    "trainer.resume=RUN_DIR",
)
HOST_LEAK = (
    "Something outlives the step in the host's memory: losses, predictions or tensors in a list, a "
    "cache without a largest size, figures that are never closed",
    "With loader workers: Python objects in the data set are copied page by page as their "
    "reference counts change; keep them in NumPy arrays, and use fewer workers",
    "To find the line: tracemalloc.take_snapshot() every hundred steps, and compare_to the first",
    "Until it is found: checkpoint often (trainer.checkpoint_every_steps=100) and go on with "
    "trainer.resume=RUN_DIR",
)
FRAGMENTATION = (
    "Before the start: PYTORCH_ALLOC_CONF=expandable_segments:True (PYTORCH_CUDA_ALLOC_CONF before "
    "torch 2.9)",
    "Fewer different sizes: pad or group inputs to a few lengths; one large image in a batch makes "
    "all of it large",
    "torch.cuda.empty_cache() between phases (before evaluation), not in every step",
    "Where blocks are split too small: PYTORCH_ALLOC_CONF=max_split_size_mb:128",
    SMALLER_BATCH,
)
OTHER_PROCESS = (
    "See who: nvidia-smi lists the processes on each card; notebooks keep theirs until they are "
    "shut down",
    "Another card: CUDA_VISIBLE_DEVICES=1",
    "In a distributed run: every rank must set its own device before it loads anything "
    "(torch.cuda.set_device, map_location when loading), or all fill card 0",
    SMALLER_BATCH,
)
LIMIT = (
    "The card has room and this process may not use it: raise the limit "
    "(torch.cuda.set_per_process_memory_fraction, a MIG slice, a budget), or keep inside it:",
    *REMEDIES,
)
TOO_LARGE = (
    "One tensor is larger than the whole device: look at the shapes in the line that failed "
    "(a broadcast, a product over the wrong dimension, an attention matrix of a long sequence)",
    "If the shape is meant: work in chunks, or use attention that keeps no matrix "
    "(scaled_dot_product_attention)",
    *REMEDIES[:3],
)
HOST = (
    "Fewer loader workers, prefetch 1 or 2: each process holds its own copies",
    "Open large files lazily (numpy.load(mmap_mode='r'), h5py) instead of reading them whole",
    "Every process loads the whole model: load once, or with torch.load(mmap=True)",
    "Raise the limit of the container or job (docker --memory, Slurm --mem); on Windows, the size "
    "of the paging file",
    SMALLER_BATCH,
)
LIBRARY = (
    "The library found no room for its workspace, which is outside torch's allocator: leave some "
    "(torch.cuda.set_per_process_memory_fraction(0.9)), or need less:",
    *REMEDIES,
)
COMMUNICATION = (
    "NCCL allocates its buffers outside torch's allocator: leave it some 1 to 2 GiB "
    "(torch.cuda.set_per_process_memory_fraction(0.9)), or fewer channels: NCCL_MAX_NCHANNELS=8",
    *REMEDIES,
)

ROOMY = 0.5
"""Peak, as a part of the device, below which a larger batch would fit."""
NOT_WORTH = GIB // 100
"""Growth in a run so far that nobody has to look at."""

TRANSIENT = (
    "Run it again, and see who else takes memory at that moment: nvidia-smi -l 1; a second process "
    "on the card, or another rank that starts, may take it and give it back",
    "Look for a limit that the message does not name: set_per_process_memory_fraction, a MIG "
    "slice, a container; Intel Arc refuses a single allocation above 4 GB",
    SMALLER_BATCH,
)
MPS_OTHERS = (
    "Other allocations are Metal's outside torch's allocator: end other programs that use the GPU, "
    "and a second framework in this process",
    "torch.mps.empty_cache() between phases; PYTORCH_MPS_HIGH_WATERMARK_RATIO=0.0 lifts the limit, "
    "at the risk that the system fails",
    SMALLER_BATCH,
)
KILLED = (
    "Make sure that it was memory: dmesg | grep -i 'killed process', or sacct -j JOB -o "
    "State,MaxRSS; somebody or a time limit may have ended the process as well",
    *HOST,
)

_BY_CAUSE = {
    "fragmentation": FRAGMENTATION,
    "other_process": OTHER_PROCESS,
    "limit": LIMIT,
    "transient": TRANSIENT,
    "too_large": TOO_LARGE,
}
_BY_KIND = {
    "host_allocator": HOST,
    "memory_error": HOST,
    "oom_killer": HOST,
    "ray": HOST,
    "killed": KILLED,
    "cublas": LIBRARY,
    "cudnn": LIBRARY,
    "cuda_library": LIBRARY,
    "nccl": COMMUNICATION,
}


def advice_for(kind: Kind, cause: Cause) -> tuple[str, ...]:
    """Return what to do about an out-of-memory error, the first thing first."""
    if kind == "mps" and cause == "other_process":
        return MPS_OTHERS
    return _BY_CAUSE.get(cause) or _BY_KIND.get(kind, REMEDIES)


def suggest(
    trend: Trend,
    ahead: Forecast | None,
    over: Sequence[str],
    peak_fraction: float | None,
    on_gpu: bool,
) -> list[str]:
    """Return sentences, the most urgent first.

    Args:
        trend: the verdict over the first device.
        ahead: its forecast, if there is one.
        over: names of the devices above their threshold now.
        peak_fraction: the first device's peak and what others hold, as a part of its memory.
        on_gpu: whether that device is a GPU.

    """
    found = []
    if ahead is not None and ahead.action != "none":
        found.append(
            f"Memory runs out within {ahead.horizon_steps:g} steps with a probability of "
            f"{ahead.risk:.0%}: {ahead.advice}"
        )
    if trend.verdict == "leak" and trend.growth_bytes > NOT_WORTH:
        found.append(f"There is a leak. {trend.evidence[0]} {LEAK[0]}. {LEAK[1]}")
    elif trend.verdict == "fragmentation":
        found.append(f"Fragmentation grows. {trend.evidence[0]} {FRAGMENTATION[0]}")
    elif trend.verdict == "other_process":
        found.append(f"Another process grows. {trend.evidence[0]} {OTHER_PROCESS[0]}")
    for name in over:
        if name == "host":
            found.append(f"The host's memory is above its threshold. {HOST[0]}")
        elif trend.verdict == "steady":
            found.append(f"{name} is above its threshold. {SMALLER_BATCH}")
    if on_gpu and not found and peak_fraction is not None and 0 < peak_fraction < ROOMY:
        found.append(
            f"At the peak {peak_fraction:.0%} of the device is in use: a larger data.batch_size, "
            "or fewer parts (memory.gradient_accumulation), would fit and train faster"
        )
    return found
