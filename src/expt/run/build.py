"""From checked settings to objects: `build` for an open group, `assemble` for model and optimizer.

A component gets the arguments its YAML gives, and, by name, what its constructor asks for and the
data knows. Hydra may build exactly the classes a node names, and nothing else.
"""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate

from expt.config.schema import OWN_ARGUMENTS, MemoryConfig, Preset
from expt.config.settings import (
    OFFLOAD_NEEDS_CUDA,
    WEIGHTS_NEED_CUDA,
    Settings,
    parameters_of,
    targets,
)
from expt.errors import ConfigError, DataError, ModelError, nearest
from expt.job import DataSet, Grouped, Pretrained, Split
from expt.memory.techniques.freezing import ever_trained, freeze_others
from expt.memory.techniques.techniques import Techniques, apply
from expt.memory.techniques.techniques import problems as technique_problems
from expt.training.batches import Examples

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from torch import nn
    from torch.optim import Optimizer


MATHEMATICS = ("attention_kernel", "attention_window", "attention_top_k")
"""Settings of `memory` that change what a model computes; the others only save memory."""
AUTO_NOT_HERE = (
    "data.batch_size=auto is found before a training (task=train) or by task=fit_batch; here give "
    "a number, like data.batch_size=16"
)


def build(settings: Settings, group: str, **provided: Any) -> Any:
    """Instantiate an open group; of `provided`, it gets what its constructor asks for by name.

    Raises:
        ConfigError: a required argument is neither in the configuration nor provided.

    """
    own = OWN_ARGUMENTS.get(group, frozenset())
    arguments = {n: v for n, v in settings.arguments[group].items() if n not in own}
    if group == "data" and settings.batch_is_auto:
        raise ConfigError(AUTO_NOT_HERE)
    parameters = parameters_of(settings.target(group))
    handed = {
        name: value
        for name, value in provided.items()
        if name in parameters and name not in arguments
    }
    missing = [
        name
        for name, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and name not in arguments
        and name not in handed
    ]
    if missing:
        raise ConfigError(
            [
                f"{group}.{name} is required by {arguments['_target_']} and not set; "
                + (
                    f"the data provides {', '.join(sorted(provided))}"
                    if provided
                    else "give it in the YAML, or let its first line take over the settings of "
                    "another: defaults: [NAME, _self_]"
                )
                for name in missing
            ]
        )
    # Hydra may build exactly the classes this node names, and nothing else.
    factory = instantiate(
        dict(arguments),
        _partial_=True,
        _convert_="all",
        _execution_whitelist_=sorted(targets(arguments)),
    )
    return factory(**handed)


def build_training_data(settings: Settings) -> DataSet:
    """Build the data of a training, of which every part that it comes to has samples.

    Raises:
        ConfigError: a required argument is not in the configuration.
        DataError: a part is empty.

    """
    data: DataSet = build(settings, "data")
    splits: list[Split] = ["train", "val"]
    if settings.trainer.test:
        splits.append("test")
    for split in splits:
        if data.size(split) == 0:
            why = "; set trainer.test=false to train without a test" if split == "test" else ""
            raise DataError(f"{type(data).__name__} has no samples in its {split} part{why}")
    return data


def build_model(
    settings: Settings, data: DataSet, inputs: Iterable[str], pretrained: bool = False
) -> nn.Module:
    """Build the model, with its layers of batch normalisation as `memory.batch_norm` says.

    With `pretrained`, a model that can reads its weights, as it was constructed; a plan does not.

    Raises:
        ConfigError: an argument is missing.
        ModelError: its forward does not take `inputs`, the data's, by name.

    """
    return model_from(settings, data.model_arguments(), inputs, pretrained, announce=True)


def model_from(
    settings: Settings,
    arguments: Mapping[str, Any],
    inputs: Iterable[str],
    pretrained: bool,
    announce: bool = False,
) -> nn.Module:
    """Build the model with what a data set's `model_arguments` returned; see `build_model`.

    With `announce`, what reading its weights returned is said.
    """
    from expt.memory.techniques.batch_norm import set_batch_norm

    model: nn.Module = build(settings, "model", **arguments)
    check_forward(model, inputs)
    if pretrained and isinstance(model, Pretrained):
        note = model.load_pretrained()
        if announce and isinstance(note, str):
            print(f"note: {note}", flush=True)
    set_batch_norm(model, settings.memory.batch_norm.value)
    if stages := settings.trainer.stages:
        one = len(stages) == 1
        key = "trainer.trainable"
        named = {key if one else f"{key}.{s.first_epoch}": s.patterns for s in stages}
        freeze_others(model, named)
    return model


def build_optimizer(settings: Settings, model: nn.Module) -> Optimizer:
    """Build the optimizer of the weights that any stage trains, in groups where there are any.

    Groups are those of the model (`expt.job.Grouped`), or else the patterns of weights' names in
    `optimizer.groups`; the other weights are a group of their own, with the optimizer's settings.

    Raises:
        ConfigError: `optimizer.groups` names a group that there is not.

    """
    chosen: Mapping[str, Mapping[str, Any]] = settings.arguments["optimizer"].get("groups") or {}
    ever = ever_trained(model)
    trained = {name: weight for name, weight in model.named_parameters() if name in ever}
    if not trained:
        raise ConfigError("trainer.trainable leaves no weight to train")
    if isinstance(model, Grouped):
        members = {name: list(group) for name, group in model.parameter_groups().items()}
        unknown = [name for name in chosen if name not in members]
    else:
        members = {name: [trained[key] for key in fnmatch.filter(trained, name)] for name in chosen}
        unknown = [name for name, group in members.items() if not group]
    if unknown:
        known = members if isinstance(model, Grouped) else trained
        raise ConfigError(
            [f"optimizer.groups.{n}: there is no such group; {nearest(n, known)}" for n in unknown]
        )
    problems = group_problems(settings, chosen)
    if problems:
        raise ConfigError(problems)
    left = dict.fromkeys(trained.values())
    parameters: list[Any] = []
    for name, group in members.items():
        own = [weight for weight in group if weight in left]
        for weight in own:
            del left[weight]
        if own:
            parameters.append({"params": own, **chosen.get(name, {})})
        elif name in chosen and group:  # a model's own group may be empty, as LoRA's of rank 0
            raise ConfigError(
                f"optimizer.groups.{name}: all of its weights are frozen or in a group before it"
            )
    if not parameters:
        parameters = list(left)
    elif left:
        parameters.append({"params": list(left)})
    optimizer: Optimizer = build(settings, "optimizer", params=parameters)
    if not settings.memory.optimizer_in_backward:
        return optimizer
    from expt.memory.techniques.optimizer_in_backward import OptimizerInBackward

    return OptimizerInBackward(optimizer)


def assemble(
    settings: Settings,
    fabric: Fabric,
    data: DataSet,
    examples: Examples | None = None,
    first_weights: Callable[[nn.Module], None] | None = None,
    install: Callable[[nn.Module], None] | None = None,
) -> tuple[nn.Module, Optimizer]:
    """Build model and optimizer with the memory techniques asked for, set up on the device.

    `examples` are the data's on the device, where there are any already; `first_weights`
    gives the model others to begin with; `install` is called when it has its weights, before
    anything is put on it.

    Raises:
        ConfigError: an argument is missing, or a technique does not apply to this model.
        ModelError: its forward does not take the data's inputs.

    """
    inputs = (examples or Examples(data, fabric.device)).input_names()
    model = build_model(settings, data, inputs, pretrained=True)
    if first_weights is not None:
        first_weights(model)
    if install is not None:
        install(model)
    techniques = techniques_of(settings.memory)
    problems = technique_problems(model, techniques)
    if techniques.saved_tensor_offload and fabric.device.type != "cuda":
        problems.append(OFFLOAD_NEEDS_CUDA.format(device=fabric.device.type))
    if techniques.weight_offload and fabric.device.type != "cuda":
        problems.append(WEIGHTS_NEED_CUDA.format(device=fabric.device.type))
    if problems:
        raise ConfigError(problems)
    problems = rank_problems(settings, model)
    if problems:
        raise ConfigError(problems)
    apply(model, techniques)
    if settings.trainer.sharded:  # of which the optimizer gets the parts
        sharded = fabric.setup_module(model)
        optimizer = build_optimizer(settings, sharded.module)
        return sharded, fabric.setup_optimizers(optimizer)  # type: ignore[return-value]
    optimizer = build_optimizer(settings, model)
    if techniques.weight_offload:
        from expt.memory.techniques.weight_offload import place_others

        place_others(model, fabric.device)
    wrapped = fabric.setup(model, optimizer, move_to_device=not techniques.weight_offload)
    return wrapped[0], wrapped[1]


def rank_problems(settings: Settings, model: nn.Module) -> list[str]:
    """Return why several processes cannot train this model together."""
    from torch.nn.modules.batchnorm import _NormBase

    from expt.memory.techniques.batch_norm import batch_statistics

    if settings.trainer.devices == 1:
        return []
    over = batch_statistics(model)
    frozen = settings.memory.batch_norm.value == "frozen"
    if not over and not frozen:  # instance normalisation may keep averages as well
        over = [
            name
            for name, layer in model.named_modules()
            if isinstance(layer, _NormBase) and layer.track_running_stats
        ]
    if not over:
        return []
    return [
        f"trainer.devices={settings.trainer.devices}: {type(model).__name__} keeps statistics of "
        f"the batch ({over[0]}{', …' if len(over) > 1 else ''}), and every process would have "
        "those of its own share; set memory.batch_norm=group or frozen, or trainer.devices=1"
    ]


def group_problems(settings: Settings, groups: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return what is wrong with the settings of groups of weights, as the optimizer judges them."""
    import torch

    known = inspect.signature(settings.target("optimizer")).parameters
    found = []
    for name, values in groups.items():
        unknown = [key for key in values if key not in known]
        found += [
            f"optimizer.groups.{name}.{key}: the optimizer has no such setting; "
            f"{nearest(key, set(known) - {'params'})}"
            for key in unknown
        ]
        if unknown:
            continue
        arguments = {**settings.arguments["optimizer"], **values}
        arguments.pop("groups", None)
        one = replace(settings, arguments={**settings.arguments, "optimizer": arguments})
        try:
            build(one, "optimizer", params=[torch.nn.Parameter(torch.zeros(1))])
        except ValueError as error:
            found.append(f"optimizer.groups.{name}: {error}")
    return found


def check_forward(model: nn.Module, inputs: Iterable[str]) -> None:
    """Check that a model's forward takes what the data hands it by name.

    Raises:
        ModelError: it does not.

    """
    import torch

    if model._forward_pre_hooks or type(model).__call__ is not torch.nn.Module.__call__:
        return  # they may hand it something else
    names = list(inputs)
    try:
        signature = inspect.signature(model.forward)
    except ValueError:  # compiled code tells nothing about itself
        return
    try:
        signature.bind(**dict.fromkeys(names))
    except TypeError as error:
        raise ModelError(
            f"{type(model).__name__}.forward{signature} does not take what the data gives it by "
            f"name ({', '.join(names)}): {error}; name the ones it uses, and let **others take "
            "the rest"
        ) from error


def build_callbacks(settings: Settings) -> list[Any]:
    """Build the callbacks of a run, in their order."""
    found = []
    for number, node in enumerate(settings.callbacks):
        group = f"callbacks.{number}"
        found.append(build(replace(settings, arguments={group: node}), group))
    return found


def techniques_of(memory: MemoryConfig) -> Techniques:
    """Return the memory techniques that a configuration asks for."""
    return Techniques(**{part.name: getattr(memory, part.name) for part in fields(Techniques)})


def smaller_sizes(memory: MemoryConfig) -> str:
    """Return what to try when a run of these settings does not fit, in words."""
    preset = memory.preset or Preset.lite  # what the sizes are without a preset
    smaller = list(Preset)[list(Preset).index(preset) + 1 :]
    if not smaller:
        return "a smaller model than memory=minimal"
    return f"a smaller preset ({' or '.join(f'memory={one.value}' for one in smaller)})"
