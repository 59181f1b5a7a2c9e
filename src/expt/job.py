"""What a job gives the loop: `Metric`, `Batch`, `DataSet`; a class with these methods fits.

No base class is needed, and no registration. How to add a model: a `torch.nn.Module` whose
`forward` takes the data's inputs by name and returns a prediction. Its constructor may ask, by
name, for anything in `DataSet.model_arguments()`; the rest comes from its YAML.

How to add a data set: a class with the methods of `ResidentDataSet` (small data, kept on the
device, gathered there) or of `StreamedDataSet` (read sample by sample, in worker processes). Both
need the methods of `DataSet`; the optional protocols below add to it. docs/add-a-job.md has an
example of each.

Letters: `B` samples in a batch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeGuard, runtime_checkable

from expt.errors import ConfigError, nearest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Split = Literal["train", "val", "test"]
METRIC_NAME = re.compile(r"[\w.\- ]*\w[\w.\- ]*")
"""What a tracker keeps unchanged, without the slash between a split and a metric's name."""


@dataclass(frozen=True)
class Metric:
    """A figure that evaluation computes, and which way is better.

    Args:
        name: key of `Accumulator.compute()`, like ``mae`` or ``accuracy``: letters, digits, ``_``,
            ``-``, ``.`` and blanks. Reports put the split before it, like ``val/mae``.
        goal: whether a lower (``min``) or a higher (``max``) value is better.
        label: for tables and figures; the name in upper case where there is none.
        unit: of the value, for labels.
        percent: whether a value of 1 is shown as 100 %.
        digits: after the decimal point.

    """

    name: str
    goal: Literal["min", "max"] = "min"
    label: str = ""
    unit: str = ""
    percent: bool = False
    digits: int = 3

    def __post_init__(self) -> None:
        if not self.label:
            object.__setattr__(self, "label", self.name.upper().replace("_", " "))
        if self.goal not in ("min", "max"):
            raise ConfigError(f"metric {self.name}: goal must be min or max, got {self.goal!r}")

    @property
    def direction(self) -> str:
        """Return ``minimize`` or ``maximize``, as Optuna has it."""
        return "minimize" if self.goal == "min" else "maximize"

    @property
    def worst(self) -> float:
        """Return the value that is worse than any other."""
        return math.inf if self.goal == "min" else -math.inf

    def better(self, new: float, old: float | None) -> bool:
        """Tell whether `new` is better than `old`; anything finite is better than none."""
        if not math.isfinite(new):
            return False
        return old is None or not math.isfinite(old) or self.cost(new) < self.cost(old)

    def cost(self, value: float) -> float:
        """Return what is minimised: the value, or its negative where higher is better."""
        return value if self.goal == "min" else -value

    def best(self, values: Iterable[float]) -> float | None:
        """Return the best of some values, None if none is finite."""
        return min((v for v in values if math.isfinite(v)), key=self.cost, default=None)

    def text(self, value: float | None, unit: bool = True) -> str:
        """Return a value for a reader: ``3.041 mph``, ``87.5 %``, ``-`` for None."""
        if value is None:
            return "-"
        if self.percent:
            digits = max(self.digits - 2, 0)
            return f"{100 * value:.{digits}f}{' %' if unit else ''}"
        return f"{value:.{self.digits}f} {self.unit if unit else ''}".rstrip()

    def axis(self) -> str:
        """Return the label of an axis: ``MAE (mph)``."""
        unit = "%" if self.percent else self.unit
        return f"{self.label} ({unit})" if unit else self.label

    def tick(self, value: float) -> str:
        """Return a value beside an axis with that label: ``87.5`` for 0.875 of a percentage."""
        return f"{100 * value if self.percent else value:g}"

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, as ``result.json`` keeps them."""
        return asdict(self)

    def brief(self) -> dict[str, Any]:
        """Return what differs from the defaults, which `from_dict` takes as well."""
        default = Metric(self.name)
        values = self.as_dict().items()
        return {"name": self.name} | {k: v for k, v in values if v != getattr(default, k)}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Metric:
        """Return the metric that `as_dict` described; keys not known any more are left out."""
        known = {part.name for part in fields(cls)}
        return cls(**{name: value for name, value in stored.items() if name in known})


def monitored(metrics: Sequence[Metric], name: str | None) -> Metric:
    """Return the metric that decides which weights are best: the first, or the one named.

    Raises:
        ConfigError: the data set declares no metric of this name, or none at all, or one whose
            name would not be read back.

    """
    if not metrics:
        raise ConfigError("the data set declares no metrics; its `metrics` must name at least one")
    illegal = [metric.name for metric in metrics if not METRIC_NAME.fullmatch(metric.name)]
    if illegal:
        raise ConfigError(
            f"the data set declares the metric {illegal[0]!r}; a metric's name is made of letters, "
            "digits, '_', '-', '.' and blanks, so that every record of it can be read back"
        )
    if name is None:
        return metrics[0]
    known = {metric.name: metric for metric in metrics}
    if name not in known:
        raise ConfigError(
            f"trainer.monitor={name}: the data set has no such metric; {nearest(name, known)}"
        )
    return known[name]


@dataclass(frozen=True)
class Batch:
    """`inputs` go to the model by name, ``model(**batch.inputs)``; `target` to the loss.

    Every tensor has the samples along its first axis [B].
    """

    inputs: Mapping[str, Tensor]
    target: Tensor

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.target)

    def each(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """Return a batch of what `function` makes of every tensor."""
        inputs = {name: function(value) for name, value in self.inputs.items()}
        return Batch(inputs, function(self.target))


class Accumulator(Protocol):
    """Adds up over a whole split, so that no figure is a mean of per-batch means."""

    def update(self, prediction: Tensor, batch: Batch) -> None:
        """Add one batch; must not synchronise with the host."""

    def compute(self) -> dict[str, float]:
        """Return the figures over everything seen, by the names of `DataSet.metrics`."""


class DataSet(Protocol):
    """What training needs of any data."""

    metrics: Sequence[Metric]
    """What evaluation computes. The first is monitored; `trainer.monitor` chooses another."""
    batch_size: int
    """Samples per optimizer step; the loop splits it into `memory.gradient_accumulation` parts."""
    eval_batch_size: int
    """Samples per forward pass in evaluation."""

    def size(self, split: Split) -> int:
        """Return the number of samples in a split."""

    def model_arguments(self) -> Mapping[str, Any]:
        """Return what a model's constructor may ask for by name (``num_classes``, …)."""

    def loss(self, prediction: Tensor, batch: Batch) -> Tensor:
        """Return the loss summed over the batch, a scalar; never averaged.

        The loop divides the sum by the weight of the whole step, so that gradient accumulation
        does not change the result.
        """

    def accumulator(self) -> Accumulator:
        """Return a new accumulator of the figures that `metrics` declares."""

    def fingerprint(self) -> str:
        """Return a short hash of what figures depend on: the values, their splits, their unit.

        Two runs with the same one can be compared.
        """


class ResidentDataSet(DataSet, Protocol):
    """Data that are kept on the device; batches are gathered there by index."""

    def to(self, device: torch.device) -> None:
        """Move what is kept on the device; called once, before training."""

    def gather(self, split: Split, indices: Tensor) -> Batch:
        """Return the samples with these indices [B] (int64, on the device) as one batch."""

    def weight(self, split: Split, indices: Tensor) -> Tensor:
        """Return what the summed loss of these samples is divided by, a scalar on the device."""


class StreamedDataSet(DataSet, Protocol):
    """Data that are read sample by sample, on the host, in worker processes."""

    def item(self, split: Split, index: int, generator: torch.Generator) -> Batch:
        """Read one sample; its tensors are on the CPU and have no batch axis.

        Called in a worker process, so the object must be picklable. Random augmentation must draw
        from `generator` alone, which is seeded by (`trainer.seed`, epoch, index): the sample is
        then the same after a resume, with any number of workers.

        Raises:
            Exception: the sample cannot be read; see `loader.on_bad_sample`.

        """


@runtime_checkable
class Resident(Protocol):
    """A data set that says which tensors it keeps on the device; optional."""

    def resident(self) -> Iterable[Tensor]:
        """Return the tensors, so that a plan counts them; where absent, all attributes count."""


@runtime_checkable
class Weighted(Protocol):
    """A streamed data set whose loss is not divided by the number of samples; optional."""

    def batch_weight(self, batch: Batch) -> Tensor:
        """Return what the summed loss of these samples is divided by, a scalar on the host."""


@runtime_checkable
class Collated(Protocol):
    """A streamed data set whose samples are not just stacked to a batch; optional."""

    def collate(self, items: Sequence[Batch]) -> Batch:
        """Return the samples as one batch, with a first axis [B]."""


@runtime_checkable
class Ordered(Protocol):
    """A data set that says in which order its training samples come; optional, else by chance."""

    def training_order(self, seed: int, epoch: int) -> Tensor:
        """Return an epoch's order, int64 [N] on the host, every sample once.

        Steps are cut from it, `batch_size` samples each, so that it says who is in a batch with
        whom: `expt.jobs.vision.grouping.ordered_by_size` puts images of a size together. It must
        follow from its arguments alone, or a run cannot be resumed.
        """


@runtime_checkable
class Named(Protocol):
    """A streamed data set that can say where a sample comes from; optional."""

    def sample_name(self, split: Split, index: int) -> str:
        """Return the file, for messages about a sample that cannot be read."""


@runtime_checkable
class Exemplary(Protocol):
    """A streamed data set that knows the shapes of its batches without reading one; optional."""

    def example(self, split: Split, count: int) -> Batch:
        """Return a batch of `count` samples whose values do not matter; nothing is read."""


@runtime_checkable
class Plotted(Protocol):
    """A data set with figures of its own; optional."""

    def plots(
        self, predict: Callable[[Batch], Tensor], metrics: Any, folder: Path
    ) -> Sequence[Path]:
        """Draw the test's predictions and its accumulator `metrics`; return the PNG files."""


@runtime_checkable
class Transformed(Protocol):
    """A data set with values taken from its training part, like a scaler; optional.

    They are kept with the best weights. Its constructor takes ``transforms``, which is given only
    to predict on other data: nothing is then fitted, and every sample is of the split ``test``.
    A target that is not known is what the accumulator passes over.
    """

    def transforms(self) -> Mapping[str, Any]:
        """Return the values by name: numbers, text, arrays, and lists of them."""


@runtime_checkable
class Predicted(Protocol):
    """A data set that writes predictions in its own terms; optional, else they are an npz."""

    prediction_formats: Sequence[str]
    """What `predict.format` may be, the default first, like ``("npz", "parquet")``."""

    def write_predictions(
        self, split: Split, predictions: Tensor, indices: Tensor, path: Path
    ) -> None:
        """Write what the model returned for the samples `indices` [B] of a split.

        Args:
            split: whose samples they are.
            predictions: [B, ...], on the host, in float32 where the model's are floating.
            indices: int64, ascending; a sample that could not be read is left out.
            path: the file; its ending is the format.

        """


@dataclass(frozen=True)
class Trial:
    """One try of a policy in a simulator.

    Attributes:
        task: what is to be solved.
        seed: where things stand, and the noise that the policy starts from.
        told: the task whose sentence the policy is given; another than `task` shows whether it
            listens.

    """

    task: str
    seed: int
    told: str


class Simulator(Protocol):
    """Trials that go on at the same time, so that a model decides for all of them at once.

    Letters: `R` trials that are running.
    """

    @property
    def running(self) -> Sequence[int]:
        """The numbers of the trials that are neither solved nor at their last step."""

    @property
    def solved(self) -> Sequence[bool]:
        """Whether each trial was solved, at any step so far."""

    @property
    def steps(self) -> Sequence[int]:
        """How many steps each trial has taken."""

    def observe(self) -> Batch:
        """Return what the running trials see, inputs [R, ...] as those of the split ``test``."""

    def act(self, predictions: Tensor, steps: int) -> None:
        """Let the running trials do `steps` of what the model predicted for them [R, ...].

        Raises:
            ConfigError: a prediction has fewer steps.

        """

    def film(self, number: int, path: Path) -> None:
        """Write what a trial looked like as a video.

        Raises:
            ExptError: something that draws or encodes is not installed.

        """

    def close(self) -> None:
        """Free what the trials hold."""


@runtime_checkable
class Simulated(Protocol):
    """A data set whose model can act in a simulator, which `task=rollout` lets it do; optional."""

    @property
    def simulated_tasks(self) -> Sequence[str]:
        """The tasks that the data are about."""

    def fresh_seeds(self, count: int) -> Sequence[int]:
        """Return seeds that none of the data were made with, always the same."""

    def simulator(self, trials: Sequence[Trial], steps: int) -> Simulator:
        """Begin trials of at most `steps` steps.

        Raises:
            ConfigError: an unknown task, or the simulator is not installed.

        """


@runtime_checkable
class Described(Protocol):
    """A data set that can say what it holds; optional, printed where a run begins."""

    def describe(self) -> str:
        """Return one line of facts, and one more per warning."""


@runtime_checkable
class Checked(Protocol):
    """A class that can judge its arguments before it is built; optional."""

    @classmethod
    def problems(cls, arguments: Mapping[str, Any]) -> list[str]:
        """Return one message per impossible value or combination among `arguments`."""


@runtime_checkable
class Cached(Protocol):
    """A data set or model with caches that may be emptied when memory is short; optional."""

    def clear(self) -> None:
        """Empty the caches; what they held is made again when it is needed."""


@runtime_checkable
class Advising(Protocol):
    """A streamed data set that knows what makes its samples cheaper to read; optional."""

    def cheaper(self) -> Sequence[str]:
        """Return settings like ``data.resize=128``, the best first, for a run that waits."""


@runtime_checkable
class Tunable(Protocol):
    """A streamed data set whose runs may change how it is read; see `expt.training.tuning`."""

    tune: bool
    """Whether that is wanted."""
    preprocess_on: str
    """``worker`` or ``device``: where samples are normalised; read when workers start."""


@runtime_checkable
class Pretrained(Protocol):
    """A model whose weights are read from disk apart from its construction; optional."""

    def load_pretrained(self) -> str | None:
        """Read the weights; called once before training, never by a plan.

        Returns a note for the user, such as that there are none to read; else nothing.
        """


@runtime_checkable
class FeatureCached(Protocol):
    """A model that can say what its frozen part makes of a sample, so that it is kept; optional.

    See docs/feature-cache.md. Modes are those of `memory.feature_cache`: ``prefix`` (all below the
    first trained weight), ``vision`` (a frozen tower) and ``alternating`` (the last hidden state,
    of a part that is trained). What is kept of a frozen part is made in evaluation mode: to compute
    the same without a cache, a model keeps that part in evaluation mode while it trains.
    """

    feature_modes: Sequence[str]
    """Those that it offers, as it is configured."""

    def feature_inputs(self, mode: str) -> Sequence[str]:
        """Return the inputs of `forward` that the features take the place of."""

    def features(self, mode: str, **inputs: Tensor) -> Mapping[str, Tensor]:
        """Return the features [B, ...] by the names under which `forward` takes them.

        A sample's own must not depend on the others of its batch, and are of the same shape for
        every sample. It is given, of a batch's inputs, those that its signature names, or all.
        """

    def frozen_part(self, mode: str) -> Iterable[tuple[str, torch.nn.Module]]:
        """Return what features make superfluous: modules, with their names in the model."""

    def without_frozen_part(self, mode: str) -> None:
        """Let go of them: their weights leave the device; names of the others stay as they are."""


@runtime_checkable
class FeatureKeyed(Protocol):
    """A `FeatureCached` model that knows which settings its features depend on; optional.

    Without it they are made again whenever any argument of the model is another.
    """

    def feature_settings(self, mode: str) -> Mapping[str, Any]:
        """Return plain values that features depend on, beside weights, data and precision."""


@runtime_checkable
class WithoutInputs(Protocol):
    """A streamed data set that can do without reading some of its inputs; optional."""

    def without(self, inputs: Sequence[str]) -> StreamedDataSet:
        """Return the same data whose items lack these inputs; other values stay as they were."""


@runtime_checkable
class Augmenting(Protocol):
    """A streamed data set that says whether it changes its inputs by chance; optional."""

    augments: bool
    """Whether the same sample may have other inputs in another epoch."""


@runtime_checkable
class Grouped(Protocol):
    """A model whose parameters are trained at different rates; optional."""

    def parameter_groups(self) -> Mapping[str, Iterable[torch.nn.Parameter]]:
        """Return the trained parameters by group; `optimizer.groups` sets each group's values."""


def is_resident(data: DataSet) -> TypeGuard[ResidentDataSet]:
    """Tell whether a data set is kept on the device; else its samples are read one by one."""
    return hasattr(data, "gather")


def protocol_problem(cls: type) -> str | None:
    """Return what a data set's class lacks to be one, in a line; None if nothing."""
    name = f"{cls.__module__}.{cls.__qualname__}"
    if hasattr(cls, "gather") and not hasattr(cls, "accumulator") and hasattr(cls, "metrics"):
        return (
            f"data: {name} is written for an earlier version: rename its method metrics() to "
            "accumulator(), and replace `monitor` by `metrics = [Metric(NAME), …]`, the monitored "
            "one first (from expt.job import Metric; goal='max' where higher is better)"
        )
    if not (hasattr(cls, "gather") or hasattr(cls, "item")):
        return (
            f"data: {name} has neither gather(split, indices) nor item(split, index, generator); "
            "a data set needs one of them (docs/add-a-job.md)"
        )
    needed = ["size", "model_arguments", "loss", "accumulator", "fingerprint"]
    needed += ["to", "weight"] if hasattr(cls, "gather") else []
    missing = [method for method in needed if not hasattr(cls, method)]
    if not missing and not (hasattr(cls, "metrics") or "metrics" in _assigned(cls)):
        missing = ["metrics"]
    if missing:
        lacking = ", no ".join(missing)
        return f"data: {name} has no {lacking}; a data set needs it (expt.job.DataSet)"
    return None


def _assigned(cls: type) -> set[str]:
    """Return the attributes that a class's own code sets on `self`, as far as can be seen."""
    functions = [value for base in cls.__mro__ for value in vars(base).values()]
    codes = [f.__code__ for f in functions if isinstance(f, FunctionType)]
    return {name for code in codes for name in code.co_names}
