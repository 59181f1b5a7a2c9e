"""What to do, in the order in which to try it; every setting that is named here exists.

The order is the handbook's: smaller batch with accumulation, checkpointing (for 12 layers or
more), mixed precision, fused attention, freezing parts, CPU offload, model parallelism.
"""

from __future__ import annotations

from expt.memory.diagnosis.oom import Kind
from expt.memory.diagnosis.oom_figures import Cause

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
    "Offload to the CPU what is seldom used: frozen encoders, optimizer state",
    "Model parallelism: share the model over several cards",
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
    "Raise the limit of the container or job (docker --memory, Slurm --mem)",
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

_BY_CAUSE = {
    "fragmentation": FRAGMENTATION,
    "other_process": OTHER_PROCESS,
    "limit": LIMIT,
    "too_large": TOO_LARGE,
}
_BY_KIND = {
    "host_allocator": HOST,
    "memory_error": HOST,
    "oom_killer": HOST,
    "cublas": LIBRARY,
    "cudnn": LIBRARY,
    "cuda_library": LIBRARY,
    "nccl": COMMUNICATION,
}


def advice_for(kind: Kind, cause: Cause) -> tuple[str, ...]:
    """Return what to do about an out-of-memory error, the first thing first."""
    return _BY_CAUSE.get(cause) or _BY_KIND.get(kind, REMEDIES)
