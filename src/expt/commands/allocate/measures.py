"""What else may be changed where nothing fits, and the single changes of the checklist."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from expt.commands.allocate.variants import Changes, Variant
from expt.run.target import arithmetic


@dataclass(frozen=True)
class Measure:
    """A change, and what it is about."""

    about: str
    changes: Changes

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {"about": self.about, "changes": list(self.changes)}


def emergency(variant: Variant) -> Iterator[Measure]:
    """Yield what is given up, one after the other, where even the least does not fit.

    The order is the handbook's: what costs time first, then what changes the training, then what
    needs other hardware.
    """
    memory, arguments = variant.settings.memory, variant.settings.arguments
    if memory.attention_kernel == "math":
        yield Measure("attention without its matrix", ("memory.attention_kernel=fused",))
    chunks = variant.data.eval_batch_size
    if chunks > memory.forward_chunks:
        yield Measure("evaluation sample by sample", (f"memory.forward_chunks={chunks}",))
    if arithmetic(memory.precision, variant.target) == "fp32":
        yield Measure("16 bit arithmetic", ("memory.precision=bf16",))
    if memory.activation_checkpointing is not True:
        yield Measure("activations computed again", ("memory.activation_checkpointing=true",))
    if any(not weight.requires_grad for weight in variant.model.parameters()):
        yield Measure("frozen weights in host memory", ("memory.weight_offload=true",))
    if variant.target == "cuda":
        yield Measure("activations in host memory", ("memory.saved_tensor_offload=true",))
    if "AdamW8bit" not in str(arguments["optimizer"]["_target_"]):
        yield Measure("optimizer state of 8 bits", ("optimizer=adamw_8bit",))
    yield Measure("an optimizer with hardly any state", ("optimizer=adafactor",))
    smallest = trained_without_the_largest(variant.model)
    if smallest is not None:
        patterns = ",".join(f'"{name}"' for name in smallest)
        yield Measure("the largest part frozen", (f"trainer.trainable=[{patterns}]",))


def single_changes(variant: Variant, dimensions: dict[str, list[object]]) -> Iterator[Measure]:
    """Yield the changes that a checklist asks about, each alone."""
    memory, arguments = variant.settings.memory, variant.settings.arguments
    on = memory.activation_checkpointing is not False
    yield Measure(
        f"activation checkpointing is {'on' if on else 'off'}",
        (f"memory.activation_checkpointing={'false' if on else 'true'}",),
    )
    modes = getattr(variant.settings.target("model"), "feature_modes", ())
    now = getattr(memory.feature_cache, "value", memory.feature_cache)
    for mode in ("off", *modes):
        if modes and mode != now:
            yield Measure(f"the feature cache is {now}", (f"memory.feature_cache={mode}",))
    parts = list(variant.parts.values())
    if memory.gradient_accumulation in parts:
        at = parts.index(memory.gradient_accumulation)
        for other in parts[max(at - 1, 0) : at + 2]:
            if other != memory.gradient_accumulation:
                yield Measure(
                    f"the micro-batch is {variant.micro_batch}",
                    (f"memory.gradient_accumulation={other}",),
                )
    for name, values in dimensions.items():
        group, _, argument = name.partition(".")
        listed = list((arguments[group].get("scale") or {}).get(name, values))
        configured = arguments[group][argument]
        others = [value for value in listed if value != configured]
        for value in others:
            yield Measure(f"{name} is {configured}", (f"{name}={value}",))
    if arithmetic(memory.precision, variant.target) == "fp32":
        yield Measure("the arithmetic is fp32", ("memory.precision=bf16",))
    name = str(arguments["optimizer"]["_target_"]).rpartition(".")[2]
    for choice in ("adamw", "adamw_8bit", "adafactor"):
        yield Measure(f"the optimizer is {name}", (f"optimizer={choice}",))
    if not memory.weight_offload:
        yield Measure("frozen weights are on the device", ("memory.weight_offload=true",))


def trained_without_the_largest(model: nn.Module) -> list[str] | None:
    """Return patterns of what is trained at the top of a model, less the part of most weights."""
    sizes = {
        f"{name}.*": sum(w.numel() for w in part.parameters() if w.requires_grad)
        for name, part in model.named_children()
    }
    own = model.named_parameters(recurse=False)
    sizes |= {name: weight.numel() for name, weight in own if weight.requires_grad}
    trained = {name: size for name, size in sizes.items() if size}
    if len(trained) < 2:
        return None
    largest = max(trained, key=lambda name: trained[name])
    return [name for name in trained if name != largest]
