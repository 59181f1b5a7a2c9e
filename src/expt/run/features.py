"""The feature cache of a run: `memory.feature_cache` joined to data and model.

`CachedRun` makes or finds the features when the model has its weights, lets the frozen part go and
gives the data set that training reads then. How a cache is made is `expt.training.features`; its
plan is `expt.run.feature_plans`.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from lightning_fabric import Fabric
from torch import nn

from expt.config.settings import Settings
from expt.errors import ConfigError, ModelError, nearest
from expt.job import (
    Augmenting,
    DataSet,
    FeatureCached,
    FeatureKeyed,
    StreamedDataSet,
    is_resident,
)
from expt.memory.measuring.meter import CudaMeter, LedgerMeter
from expt.memory.recovery.attempt import release
from expt.memory.recovery.recovery import Recovery
from expt.memory.techniques.techniques import Techniques, apply
from expt.memory.techniques.weight_offload import place_others
from expt.run.build import MATHEMATICS
from expt.training.checkpoint import leave_out, random_state, restore_random_state
from expt.training.features.alternating import STALENESS, Alternation
from expt.training.features.dataset import with_features
from expt.training.features.feature import (
    Feature,
    take_features,
)
from expt.training.features.filling import Filling, first_samples
from expt.training.features.store import SPLITS, Rows
from expt.units import format_bytes

ALTERNATING = "alternating"
"""The mode whose features are of a part that is trained."""
SIZES = ("batch_size", "eval_batch_size")
"""Settings of data that change no sample."""
FOLDER = "features"
"""In a run's directory, for the rows of alternating epochs."""
BUILDING = "feature_cache"
"""Phase of a plan whose peak is in making the features."""


def mode_of(settings: Settings) -> str | None:
    """Return the mode of the features that a run keeps, None without a cache."""
    return settings.memory.cached_features


def without_cache(settings: Settings) -> Settings:
    """Return the settings with the feature cache off."""
    return replace(settings, memory=replace(settings.memory, feature_cache="off"))


def check(settings: Settings, data: DataSet, model: nn.Module) -> FeatureCached:
    """Return the model as one whose features can be kept.

    Raises:
        ConfigError: it cannot be, or not of this data.

    """
    key, mode = f"memory.feature_cache={settings.memory.cached_features}", mode_of(settings)
    name = type(model).__name__
    if not isinstance(model, FeatureCached):
        raise ConfigError(
            f"{key}: {name} does not say what its frozen part makes of a sample "
            "(expt.job.FeatureCached; docs/feature-cache.md); set memory.feature_cache=off"
        )
    if mode not in model.feature_modes:
        raise ConfigError(
            f"{key}: {name}, as it is configured, offers no such features; "
            f"{nearest(str(mode), [*model.feature_modes, 'off'])}"
        )
    if is_resident(data):
        raise ConfigError(
            f"{key}: {type(data).__name__} is kept on the device, and features are kept for data "
            "that are read sample by sample; set memory.feature_cache=off"
        )
    if isinstance(data, Augmenting) and data.augments:
        raise ConfigError(
            f"{key}: {type(data).__name__} changes its inputs by chance (augments), so that "
            "features of one epoch are not those of another; switch its augmentation off, or set "
            "memory.feature_cache=off"
        )
    if mode != ALTERNATING:
        _check_frozen(key, model, str(mode))
    return model


def _check_frozen(key: str, model: FeatureCached, mode: str) -> None:
    trained = [
        f"{name}.{weight}"
        for name, module in model.frozen_part(mode)
        for weight, value in module.named_parameters()
        if value.requires_grad
    ]
    if trained:
        raise ConfigError(
            f"{key}: {len(trained)} weights of the part that is cached are trained "
            f"({trained[0]}{', …' if len(trained) > 1 else ''}); freeze them (trainer.trainable), "
            "or set memory.feature_cache=off"
        )


def reduce(model: nn.Module, mode: str, features: list[Feature]) -> None:
    """Let a model's frozen part go, and let it take features; in place.

    Raises:
        ModelError: what is left has another name, or nothing left.

    """
    cached = cast(FeatureCached, model)
    part = _names_of(cached, mode)
    before = set(model.state_dict())
    cached.without_frozen_part(mode)
    after = set(model.state_dict())
    if after != before - part:
        wrong = sorted(after ^ (before - part))
        raise ModelError(
            f"{type(model).__name__}.without_frozen_part({mode!r}) must remove what frozen_part() "
            f"names, and nothing else: {wrong[0]}{', …' if len(wrong) > 1 else ''}"
        )
    take_features(model, features)


def _names_of(model: FeatureCached, mode: str) -> set[str]:
    parts = list(model.frozen_part(mode))
    found = {f"{name}.{key}" for name, part in parts for key in part.state_dict()}
    return found & set(cast(nn.Module, model).state_dict())


@dataclass
class CachedRun:
    """The feature cache of one training.

    Args:
        settings: of the run, with the cache on.
        fabric: of the run.
        data: as it was built.
        recovery: of the run.
        meter: of the run; what making the features takes becomes part of its peak.
        run_dir: of the run, where `memory.feature_cache=alternating` keeps its rows.

    """

    settings: Settings
    fabric: Fabric
    data: DataSet
    recovery: Recovery
    meter: CudaMeter | LedgerMeter
    run_dir: Path
    alternation: Alternation | None = field(default=None, init=False)
    record: dict[str, Any] = field(default_factory=dict)
    """What ``result.json`` says about it."""
    left_parameters: int = 0
    """Parameters of the part that left the model."""

    def install(self, model: nn.Module) -> None:
        """Make the features with a model that has its weights, and let its frozen part go.

        `data` is afterwards what is trained on; where there can be no cache, nothing has changed.
        """
        mode = str(mode_of(self.settings))
        cached = check(self.settings, self.data, model)
        if mode == ALTERNATING:
            self._alternate(model)
            return
        part = _names_of(cached, mode)
        apply(model, mathematics(self.settings))
        place_others(model, self.fabric.device)
        inputs = list(cached.feature_inputs(mode))
        whole = {name: value.numel() for name, value in model.named_parameters() if name in part}
        # Noted on the model for its checkpoints, and taken back if there is no cache.
        weights = leave_out(model, part)
        rows = self._filling(cached, mode, weights, sorted(part), inputs).run()
        if rows is None:
            del vars(model)["_left_out"]
            return
        self._warn(model, cached, mode)
        reduce(model, mode, rows.features)
        release(self.fabric.device)
        self.left_parameters = sum(whole.values())
        streamed = cast(StreamedDataSet, self.data)
        self.data = with_features(streamed, rows.features, inputs, rows)

    def _alternate(self, model: nn.Module) -> None:
        """Let epochs alternate; the model stays whole."""
        settings, fabric = self.settings, self.fabric
        if fabric.world_size > 1:
            raise ConfigError(
                "memory.feature_cache=alternating: in a cached epoch the layers below get no "
                f"gradient, for which the other {fabric.world_size - 1} processes would wait; "
                "use memory.feature_cache=prefix, or one process"
            )
        apply(model, mathematics(settings))
        place_others(model, fabric.device)
        state, memory = random_state(), settings.memory
        self.alternation = Alternation(
            model, ALTERNATING, cast(StreamedDataSet, self.data), memory.feature_cache_dtype.value,
            memory.feature_cache_rebuild_interval, self.run_dir / FOLDER, settings.trainer.seed,
            fabric.device, fabric.strategy.precision,
        )  # fmt: skip
        restore_random_state(state)
        rows, self.data = self.alternation.rows, self.alternation.data
        interval = memory.feature_cache_rebuild_interval
        print(
            f"feature cache (alternating): every {interval} epochs a live one, which writes "
            f"{format_bytes(rows.bytes)} of features on its way; in the others only what lies "
            "above the features trains, and the layers below (LoRA) get no gradient",
            flush=True,
        )
        self.record |= {"mode": ALTERNATING, "rows": rows.count, "bytes": rows.bytes}
        self.record |= {"seconds": 0.0, "reused": False, "rebuild_interval": interval}

    def note(self, history: Sequence[Mapping[str, float]]) -> None:
        """Take the epochs of a run into the record."""
        ends = [0.0, *(row["seconds"] for row in history)]
        self.record["epoch_seconds"] = [round(end - begin, 3) for begin, end in pairwise(ends)]
        if self.alternation is not None:
            self.record["staleness"] = [row.get(STALENESS) for row in history]

    def _filling(
        self, model: FeatureCached, mode: str, weights: str, part: list[str], inputs: list[str]
    ) -> Filling:
        settings, fabric = self.settings, self.fabric
        data = cast(StreamedDataSet, self.data)
        key = {
            **_key(settings, model, mode),
            "weights": weights,
            "part": hashlib.sha256(" ".join(part).encode()).hexdigest(),
            "data": data.fingerprint(),
            "samples": first_samples(data, inputs, settings.trainer.seed),
            "sizes": {split: data.size(split) for split in SPLITS},
            "precision": str(fabric.strategy.precision.precision),
            "device": fabric.device.type,
        }
        meter = LedgerMeter() if type(self.meter) is LedgerMeter else self.meter
        return Watched(
            model=model, mode=mode, data=data, loader=settings.loader, seed=settings.trainer.seed,
            device=fabric.device, arithmetic=fabric.strategy.precision,
            dtype=settings.memory.feature_cache_dtype.value,
            root=Path(settings.memory.feature_cache_folder).expanduser().absolute(), key=key,
            processes=cast(Any, fabric), recovery=self.recovery, meter=meter, record=self.record,
            of_run=self.meter,
        )  # fmt: skip

    def _warn(self, model: nn.Module, cached: FeatureCached, mode: str) -> None:
        """Say where a live run would compute something else in training."""
        model.train()
        active = [
            f"{name}.{inner}".rstrip(".")
            for name, part in cached.frozen_part(mode)
            for inner, module in part.named_modules()
            if module.training and _differs(module)
        ]
        if active and self.fabric.global_rank == 0:
            print(
                f"note: {active[0]} of the cached part is in training mode when nothing is cached "
                "(dropout, or statistics of the batch); with memory.feature_cache it computes as "
                "in evaluation, so that results are not those of a live run",
                flush=True,
            )


@dataclass
class Watched(Filling):
    """Making features with a meter of its own, so that the run's looks at training."""

    of_run: Any = None

    def run(self) -> Rows | None:
        """Return the rows; see `Filling.run`."""
        rows = super().run()
        if self.meter is not self.of_run:
            peak, reserved = self.meter.peak_allocated_bytes(), self.meter.peak_reserved_bytes()
            self.of_run.restore(peak, reserved)
        return rows


def _differs(module: nn.Module) -> bool:
    """Tell whether a module computes something else in training."""
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return module.track_running_stats
    return isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0


def mathematics(settings: Settings) -> Techniques:
    """Return the techniques under which features are made: those that change what is computed.

    And weights that wait on the host, since all of them are there then.
    """
    kept = (*MATHEMATICS, "weight_offload")
    return Techniques(**{name: getattr(settings.memory, name) for name in kept})


def _key(settings: Settings, model: FeatureCached, mode: str) -> dict[str, Any]:
    """Return what features depend on, of the settings."""
    own = dict(settings.arguments["model"])
    if isinstance(model, FeatureKeyed):
        own = dict(model.feature_settings(mode))
    data = {k: v for k, v in settings.arguments["data"].items() if k not in SIZES}
    memory = settings.memory
    return {
        "version": 1,
        "mode": mode,
        "model": f"{type(model).__module__}.{type(model).__qualname__}",
        "code": _code(type(model)),
        "model_settings": own,
        "data_settings": data,
        "dtype": memory.feature_cache_dtype.value,
        "techniques": {name: getattr(memory, name) for name in MATHEMATICS},
        "batch_norm": memory.batch_norm.value,
        "torch": str(torch.__version__),
    }


def _code(cls: type) -> str:
    """Return a hash of the file that a model is written in."""
    try:
        path = inspect.getfile(cls)
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except (OSError, TypeError):
        return ""
