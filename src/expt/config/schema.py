"""The configuration's fixed part: one dataclass per fixed group, with every default and limit.

Open groups (`model`, `data`, `optimizer`) are a `_target_` and its constructor's arguments;
their defaults live in their YAML. Limits that a type cannot say are in the `problems` methods.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, fields
from enum import Enum
from importlib.util import find_spec
from typing import Any

from omegaconf import MISSING

from expt.config import command_nodes
from expt.config.command_nodes import (
    AllocateConfig,
    CardsConfig,
    DiagnoseConfig,
    ExpandConfig,
    ExportConfig,
    FitConfig,
    PredictConfig,
    ReplayConfig,
    ReportConfig,
    RolloutConfig,
    WatchConfig,
    at_least,
)
from expt.config.search_node import SearchConfig
from expt.config.stages import Stage, stage_problems, stages_of
from expt.errors import nearest, share_problems
from expt.units import budget_problem, card_problem


class Precision(Enum):
    """Arithmetic of the forward and backward pass; `auto` is bf16 on CUDA, else fp32."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Device(Enum):
    """Where to train; `auto` is CUDA or MPS where there is one, else the CPU."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


class Schedule(Enum):
    """How the learning rate goes over the run; see `expt.training.schedules`."""

    constant = "constant"
    cosine = "cosine"
    one_cycle = "one_cycle"
    step = "step"


class Compile(Enum):
    """How optimizer steps are made fast; see docs/speed.md."""

    auto = "auto"  # graph on CUDA where that is safe, else off
    off = "off"  # operator by operator
    graph = "graph"  # on CUDA: the whole step is captured once and replayed
    compile = "compile"  # the model by torch.compile; on CUDA, captured as well


class Strategy(Enum):
    """How several processes train one model; see docs/ranks.md."""

    auto = "auto"  # ddp
    ddp = "ddp"  # every one has the whole model; gradients are summed
    fsdp = "fsdp"  # every one has a part of weights, gradients and optimizer state


class BatchNorm(Enum):
    """What layers of batch normalisation do in training; see docs/techniques.md."""

    batch = "batch"  # as the model has them: over the samples of a forward pass
    frozen = "frozen"  # by their running statistics, which stay as they are
    group = "group"  # over groups of channels of every sample by itself


class FeatureDtype(Enum):
    """How cached features are kept; `auto` is as they are computed, so that nothing is lost."""

    auto = "auto"
    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


class OnOverflow(Enum):
    """What a run does that is predicted not to fit its budget."""

    refuse = "refuse"
    adapt = "adapt"  # with techniques that make it fit
    train = "train"  # all the same; recovery is there if it does run out


class Preset(Enum):
    """Rows of the size tables in `conf/model` and `conf/data`."""

    full = "full"
    lite = "lite"
    minimal = "minimal"


@dataclass
class TaskConfig:
    """Group `task`: the function that `python -m expt` runs."""

    _target_: str = MISSING
    trains: bool = False  # whether it is a training, of which a search can make trials
    for_any_device: bool = False  # it judges the budget itself, also of a device that is not here


@dataclass
class MemoryConfig:
    """Group `memory`: sizes and techniques that decide the peak."""

    preset: Preset | None = None  # None: the sizes of lite
    precision: Precision = Precision.auto
    gradient_accumulation: int = 1  # micro-batches per optimizer step; the batch stays the same
    activation_checkpointing: Any = False  # true, n >= 2 (every n-th), selective, nested
    attention_kernel: str | None = None  # fused, math, sliding_window, top_k; None: the model's
    attention_window: int | None = None  # tokens to either side, for sliding_window
    attention_top_k: int | None = None  # keys per query, for top_k
    saved_tensor_offload: bool = False  # what backward needs waits in host memory; CUDA only
    weight_offload: bool = False  # frozen weights of idle blocks wait in host memory; CUDA only
    optimizer_in_backward: bool = False  # step each weight as its gradient is done
    batch_norm: BatchNorm = BatchNorm.batch  # group and frozen are exact however a batch is cut
    forward_chunks: int = 1  # slices of a batch in evaluation, one after the other
    forward_chunks_in_training: bool = False  # also in training, where it saves little

    feature_cache: Any = "off"  # prefix, vision, alternating: docs/feature-cache.md
    feature_cache_dtype: FeatureDtype = FeatureDtype.auto
    feature_cache_rebuild_interval: int = 5  # alternating: every so many epochs is a live one
    feature_cache_folder: str = "outputs/cache/features"  # of all runs; alternating has its own

    budget: Any = None  # 200MiB, 6GiB, 6GB, 80%, bytes, auto (what is free now); None: no limit
    watch: bool = True  # read memory once a second; warn at 90 %, tidy up above the thresholds
    gpu_threshold: float = 0.85  # part of the device's memory
    cpu_threshold: float = 0.80  # part of the host's
    cleanup_interval_seconds: float = 30.0  # between two cleanups for a threshold
    force_cleanup_every: int | None = None  # steps; None: only above a threshold
    plan: bool = True  # predict the peak before training; never a reason to fail
    plan_file: str | None = None  # a plan.json of this very run, instead of predicting again
    card: Any = None  # 24GiB: the card that a plan for CUDA is for; None: the one here, if any
    target: str | None = None  # cuda or cpu: what to plan for; None: the run's device, else cuda
    on_overflow: OnOverflow = OnOverflow.refuse  # what to do when the plan exceeds the budget
    recover: bool = True  # when memory runs out, do the same step again with techniques that save
    max_recoveries: int = 100  # in a run
    max_recoveries_per_step: int = 12
    fallback: Any = "none"  # or preset (fallback_settings), or a list: smaller runs to try instead
    fallback_settings: list[str] = field(default_factory=list)  # from the largest run on

    def problems(self) -> list[str]:
        """Return one message per value out of range, and per contradiction."""
        found = at_least(
            "memory",
            self,
            gradient_accumulation=1,
            forward_chunks=1,
            attention_window=1,
            attention_top_k=1,
            max_recoveries=1,
            max_recoveries_per_step=1,
            force_cleanup_every=1,
            feature_cache_rebuild_interval=2,
        )
        found += _feature_cache_problems(self.feature_cache)
        found += [
            f"memory.{name} must be above 0 and at most 1, like 0.85, got {getattr(self, name)}"
            for name in ("gpu_threshold", "cpu_threshold")
            if not 0 < getattr(self, name) <= 1
        ]
        if not self.cleanup_interval_seconds >= 0:
            found.append(
                "memory.cleanup_interval_seconds must not be negative, got "
                f"{self.cleanup_interval_seconds}"
            )
        if self.budget is not None and (problem := budget_problem(self.budget)) is not None:
            found.append(problem)
        if self.card is not None and (problem := card_problem(self.card)) is not None:
            found.append(problem)
        if self.target not in (None, "cuda", "cpu"):
            found.append(f"memory.target={self.target!r} must be cuda, cpu or null")
        if self.fallback not in ("none", "preset") and not isinstance(self.fallback, list):
            found.append(
                f"memory.fallback={self.fallback!r} must be none, preset, or a list of settings "
                "like ['+memory=lite','+memory=minimal']"
            )
        found += [
            f"memory.fallback: {entry!r} is no setting; write key=value"
            for entry in self.smaller_runs
            if "=" not in str(entry)
        ]
        if self.fallback == "preset" and not self.fallback_settings:
            found.append("memory.fallback=preset: memory.fallback_settings names no smaller run")
        found += _checkpointing_problems(self.activation_checkpointing)
        found += self._attention_problems()
        if self.forward_chunks_in_training and self.forward_chunks == 1:
            found.append(
                "memory.forward_chunks_in_training=true does nothing with "
                "memory.forward_chunks=1; give the number of slices"
            )
        if self.on_overflow is OnOverflow.adapt and not self.plan:
            found.append(
                "memory.on_overflow=adapt needs a prediction, and memory.plan=false makes none; "
                "set memory.plan=true, or memory.on_overflow=train to go without"
            )
        if self.optimizer_in_backward and self.gradient_accumulation > 1:
            found.append(
                "memory.optimizer_in_backward=true steps each weight in the backward pass, before "
                f"memory.gradient_accumulation={self.gradient_accumulation} has summed the "
                "gradients of all parts; choose one of the two"
            )
        if self.optimizer_in_backward and self.precision is Precision.fp16:
            found.append(
                "memory.optimizer_in_backward=true steps before fp16's scaler has seen whether "
                "the gradients overflow; use memory.precision=bf16 or fp32"
            )
        return found

    @property
    def cached_features(self) -> str | None:
        """Return the mode of the feature cache, None if it is off; YAML reads off as false."""
        return None if self.feature_cache in OFF else str(self.feature_cache)

    @property
    def smaller_runs(self) -> list[str]:
        """Return the settings that make a run smaller, one after the other; none if not wanted."""
        if isinstance(self.fallback, list):
            return self.fallback
        return self.fallback_settings if self.fallback == "preset" else []

    def _attention_problems(self) -> list[str]:
        kernel = self.attention_kernel
        if kernel is not None and kernel not in ATTENTION_KERNELS:
            return [
                f"memory.attention_kernel={kernel!r} is no kernel; "
                f"{nearest(kernel, ATTENTION_KERNELS)}"
            ]
        found = []
        for name, own in (("attention_window", "sliding_window"), ("attention_top_k", "top_k")):
            value = getattr(self, name)
            if kernel == own and value is None:
                found.append(f"memory.attention_kernel={own} needs memory.{name}, like 32")
            if kernel != own and value is not None:
                found.append(
                    f"memory.{name}={value} does nothing unless memory.attention_kernel={own}"
                )
        return found


@dataclass
class TrainerConfig:
    """Group `trainer`: the loop, its limits, and what is saved when."""

    device: Device = Device.auto
    devices: int = 1  # processes, each on a device of its own; under torchrun: as many as it starts
    strategy: Strategy = Strategy.auto  # how they share the work: ddp or fsdp
    seed: int = 0
    deterministic: bool = False  # also refuse non-deterministic CUDA kernels
    compile: Compile = Compile.auto  # same results to rounding; falls back to off with a line
    epochs: int = 30
    steps_per_epoch: int | None = None  # None: the whole training part
    max_steps: int | None = None  # total optimizer steps
    time_limit_seconds: float | None = None
    monitor: str | None = None  # metric that decides what is best; None: the data set's first
    early_stopping_patience: int | None = 8  # epochs without a better validation; None: never
    eval_batches: int | None = None  # None: the whole split; a limit is for smoke tests only
    schedule: Schedule = Schedule.one_cycle
    warmup_fraction: float = 0.1  # of all steps, for one_cycle and cosine
    step_milestones: list[float] = field(default_factory=lambda: [0.5, 0.8])  # of all steps
    step_factor: float = 0.1
    start_from: str | None = None  # a run whose best weights are the first ones, by their names
    trainable: Any = None  # patterns of weights' names, like [expert.*], or by first epoch
    gradient_clip_norm: float | None = 5.0
    ema_decay: float | None = None  # validate and test averaged weights; per step, like 0.9995
    checkpoint_every_steps: int | None = 500  # also after every epoch; None: only then
    log_every_steps: int = 50
    resume: Any = False  # true: go on in hydra.run.dir; a path: go on there
    test: bool = True  # test the best weights at the end; false: leave the test part alone
    save_predictions: bool = False  # keep what the best weights predict of the test part
    progress: bool = True
    repeat_first_epoch: bool = False  # the same samples every epoch, to see a model overfit
    profile: bool = False  # a trace of a few steps and whose memory was what; docs/diagnosis.md

    @property
    def sharded(self) -> bool:
        """Whether every process has a part of the model only."""
        return self.strategy is Strategy.fsdp

    @property
    def stages(self) -> tuple[Stage, ...]:
        """What is trained from which epoch on; none where it is always everything."""
        return stages_of(self.trainable, self.epochs)

    def problems(self) -> list[str]:
        """Return one message per value out of range."""
        found = at_least(
            "trainer",
            self,
            devices=1,
            epochs=1,
            steps_per_epoch=1,
            max_steps=1,
            early_stopping_patience=1,
            eval_batches=1,
            checkpoint_every_steps=1,
            log_every_steps=1,
            seed=0,
        )
        found += stage_problems(self.trainable)
        if self.seed > MAX_SEED:
            found.append(f"trainer.seed must be at most {MAX_SEED}, got {self.seed}")
        if self.strategy is Strategy.fsdp and self.devices == 1:
            found.append(
                "trainer.strategy=fsdp shares the model among several processes, and "
                "trainer.devices=1; give trainer.devices=N, or leave trainer.strategy out"
            )
        for name in ("time_limit_seconds", "gradient_clip_norm"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                found.append(f"trainer.{name} must be a positive number or null, got {value}")
        found += share_problems("trainer.warmup_fraction", self.warmup_fraction)
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            found.append(f"trainer.ema_decay must be in (0, 1) or null, got {self.ema_decay}")
        if any(not 0 < at < 1 for at in self.step_milestones):
            found.append(
                "trainer.step_milestones are fractions of the run between 0 and 1, "
                f"got {list(self.step_milestones)}"
            )
        if self.compile is Compile.graph and self.device in (Device.cpu, Device.mps):
            found.append(
                "trainer.compile=graph captures CUDA's work, and "
                f"trainer.device={self.device.value}; try trainer.compile=compile or off"
            )
        if not isinstance(self.resume, bool | str):
            found.append(
                f"trainer.resume must be true, false or a run's directory, got {self.resume!r}"
            )
        return found


class BadSample(Enum):
    """What to do with a sample that cannot be read."""

    fail = "fail"  # end the run, and name the file
    skip = "skip"  # count it; in training the next sample that can be read takes its place


def usable_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass
class LoaderConfig:
    """Node `loader`: how samples of a streamed data set are read; resident data read none."""

    num_workers: int = 2  # processes that read ahead; 0: this one reads, when samples are needed
    prefetch_factor: int = 2  # batches that each worker holds ready, in host memory
    persistent_workers: bool = True  # keep the processes from epoch to epoch
    pin_memory: bool | None = None  # page-locked batches, faster to copy; None: on CUDA
    on_bad_sample: BadSample = BadSample.fail

    def problems(self) -> list[str]:
        """Return one message per value out of range."""
        found = at_least("loader", self, num_workers=0, prefetch_factor=1)
        cores = usable_cores()
        if self.num_workers > max(cores, MIN_WORKERS):
            found.append(
                f"loader.num_workers={self.num_workers} is more than the {cores} cores that this "
                f"process may use; try loader.num_workers={cores}"
            )
        return found


@dataclass
class TrackingConfig:
    """Group `tracking`: where runs are recorded; `uri: null` records nothing outside outputs/."""

    uri: str | None = None
    experiment: str = "expt"
    artifacts: str | None = None  # folder for artifacts, for a SQLite store only
    flush_seconds: float = 30.0
    parent: str | None = None  # folder of the run that this one is nested under
    loggers: list[str] = field(default_factory=lambda: ["mlflow"])  # also csv, tensorboard

    def __post_init__(self) -> None:
        if "mlflow" not in self.loggers:
            self.uri = None

    def problems(self) -> list[str]:
        """Return one message per value out of range."""
        found = [
            f"tracking.loggers: there is no {name!r}; {nearest(name, LOGGERS)}"
            for name in self.loggers
            if name not in LOGGERS
        ]
        packages = ("tensorboard", "tensorboardX")
        if "tensorboard" in self.loggers and not any(map(find_spec, packages)):
            found.append(
                "tracking.loggers: tensorboard needs its package: pip install 'expt[tensorboard]'"
            )
        if self.flush_seconds < 0:
            found.append(f"tracking.flush_seconds must not be negative, got {self.flush_seconds}")
        if self.uri is not None:
            scheme, separator, _ = self.uri.partition("://")
            if not separator or scheme.partition("+")[0] not in STORES:
                found.append(
                    f"tracking.uri={self.uri!r} names no tracking server; it begins with "
                    f"{', '.join(f'{name}://' for name in STORES)}; tracking=none records nothing"
                )
        return found


@dataclass
class Config:
    """The whole configuration; stored as the base that `conf/config.yaml` fills."""

    task: TaskConfig = field(default_factory=TaskConfig)
    model: dict[str, Any] = MISSING
    data: dict[str, Any] = MISSING
    optimizer: dict[str, Any] = MISSING
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    diagnose: DiagnoseConfig = field(default_factory=DiagnoseConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    fit: FitConfig = field(default_factory=FitConfig)
    cards: CardsConfig = field(default_factory=CardsConfig)
    allocate: AllocateConfig = field(default_factory=AllocateConfig)
    expand: ExpandConfig = field(default_factory=ExpandConfig)
    callbacks: list[Any] = field(default_factory=list)  # a `_target_` each, and its arguments
    report: ReportConfig = field(default_factory=ReportConfig)
    predict: PredictConfig = field(default_factory=PredictConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    search: SearchConfig | None = None


COMMAND_NODES = frozenset(
    node.name
    for node in fields(Config)
    if getattr(node.default_factory, "__module__", "") == command_nodes.__name__
) - {"fit"}
"""Nodes that say what one command does; `fit` is a training's too, with `data.batch_size=auto`."""
LOGGERS = ("mlflow", "csv", "tensorboard")
"""Values of `tracking.loggers`."""
MIN_WORKERS = 2
"""So many workers are allowed on any machine: the default must be valid everywhere."""
MAX_SEED = 2**32 - 1
"""The largest seed that NumPy takes."""
ATTENTION_KERNELS = ("math", "fused", "sliding_window", "top_k")
"""Values of `memory.attention_kernel`; see `expt.jobs.attention`."""
STORES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql", "databricks")
"""Schemes of a tracking URI; MLflow's file store is no longer maintained."""
AUTO = "auto"
"""As `data.batch_size`: the largest that fits, found before a training."""
OWN_ARGUMENTS = {
    "optimizer": frozenset({"groups"}),
    "model": frozenset({"scale"}),
    "data": frozenset({"scale"}),
}
"""Keys of an open group that are ours, and not its constructor's."""
OPEN_GROUPS = ("model", "data", "optimizer")
"""Groups whose keys are a `_target_` and its constructor's arguments."""


FEATURE_CACHES = ("off", "prefix", "vision", "alternating")
"""Values of `memory.feature_cache`."""
OFF = ("off", False, None)
HIDDEN_STATES = ("hidden", "last", "last_hidden", "last_hidden_state", "full", "hybrid")
"""What one may call a cache of the last hidden state."""


def _feature_cache_problems(mode: object) -> list[str]:
    """Judge `memory.feature_cache`."""
    if mode in FEATURE_CACHES or mode in OFF:
        return []
    if mode in HIDDEN_STATES:
        return [
            f"memory.feature_cache={mode}: with the last hidden state cached, no weight below it "
            "(LoRA's are) gets a gradient, so that building it again every few epochs changes "
            "nothing; memory.feature_cache=prefix caches what lies below the first trained weight "
            "and is exact, and alternating trains in a live epoch every "
            "memory.feature_cache_rebuild_interval"
        ]
    hint = nearest(str(mode), FEATURE_CACHES)
    return [f"memory.feature_cache={mode!r} must be {', '.join(FEATURE_CACHES)}; {hint}"]


CHECKPOINTING_WORDS = ("selective", "nested")
"""Modes of `memory.activation_checkpointing` beside true, false and a number."""


def _checkpointing_problems(mode: object) -> list[str]:
    """Judge `memory.activation_checkpointing`."""
    if isinstance(mode, bool) or mode in CHECKPOINTING_WORDS:
        return []
    if isinstance(mode, int) and mode >= 2:
        return []
    allowed = "true, false, selective, nested, or a number from 2 up (every n-th block)"
    known = (*CHECKPOINTING_WORDS, "true", "false")
    hint = f"; {nearest(mode, known)}" if isinstance(mode, str) else ""
    return [f"memory.activation_checkpointing={mode!r} must be {allowed}{hint}"]
