"""`task=predict`: what a run's best weights predict, of its own data or of others.

    python -m expt task=predict predict.run=RUN_DIR data.path=NEW.npz

The settings are the run's; those given now, of the data above all, come after them. Of other data
everything is predicted, scaled as in training; of the run's own data its test part. Predictions,
figures and ``predict.json`` are written into the output directory. What is particular to a job is
in its data set: `expt.job.Transformed`, `Predicted` and `Plotted`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from rich import box
from rich.table import Table

from expt.config.command_nodes import PredictConfig
from expt.config.compose import key
from expt.config.settings import RunContext, Settings
from expt.config.validate import validated
from expt.errors import ConfigError, nearest
from expt.files import write_json
from expt.job import Accumulator, DataSet, Described, Plotted, Split
from expt.memory.measuring.meter import meter_for
from expt.memory.recovery.recovery import Recovery
from expt.memory.techniques.techniques import Techniques
from expt.result import load_launch
from expt.run.saved import SavedRun, data_for, load
from expt.tables import print_table
from expt.tracking.tracker import open_tracker
from expt.training.batches import Batches, place
from expt.training.device import make_fabric
from expt.training.evaluate import Kept, evaluate, predict
from expt.training.evaluate import figures as figures_of
from expt.training.predictions import FOLDER, formats, write_predictions

FILE_NAME = "predict.json"
HOW = {"batch_size", "eval_batch_size"}
"""Arguments of data that do not decide what is predicted."""


@dataclass(frozen=True)
class PredictResult:
    """What ``predict.json`` holds, and the files with the predictions and the figures."""

    record: dict[str, Any]
    predictions: Path
    plots: tuple[Path, ...] = ()
    exit_code: int = 0

    @property
    def metrics(self) -> dict[str, float]:
        """The figures over what was measured of the predicted; none if nothing was."""
        return cast("dict[str, float]", self.record["metrics"])


def run(cfg: DictConfig, context: RunContext) -> PredictResult:
    """Predict, and write what was predicted.

    Raises:
        ConfigError: a setting is wrong, or the run has no weights to use.
        DataError: the data are not there, or do not fit the model.

    """
    node = cast(PredictConfig, OmegaConf.to_object(cfg.predict))
    if problems := node.problems():
        raise ConfigError(problems)
    settings = validated(cfg, context.overridden)
    fabric = make_fabric(settings.trainer.device, settings.memory.precision)
    saved = load(str(node.run))
    data, is_new = open_for(saved, settings, context)
    split = split_of(node, data, is_new)
    path = context.run_dir / FOLDER / f"{split}.{format_of(node, data)}"
    place(data, fabric.device)
    model = fabric.setup(saved.model)
    if isinstance(data, Described):
        print(data.describe(), flush=True)
    recovery = Recovery(Techniques(), fabric.device, on_event=lambda event: print(event.line()))
    batches = Batches(data, fabric.device, settings.loader, settings.trainer.seed)
    try:
        kept = evaluate(
            model, batches, split, meter_for(fabric.device, None), recovery=recovery,
            accumulator=lambda: Kept(data.accumulator()),
        )  # fmt: skip
        assert isinstance(kept, Kept), "nothing interrupts it"
        write_predictions(batches, split, kept.predictions, path)
        plots: tuple[Path, ...] = ()
        if node.plots and isinstance(data, Plotted) and split == "test":
            plots = tuple(
                data.plots(
                    lambda batch: predict(model, batch, recovery),
                    kept.inner,
                    context.run_dir / "plots",
                )
            )
    finally:
        batches.close()
    record = as_record(saved, data, split, kept, len(batches.skipped))
    write_json(context.run_dir / FILE_NAME, record)
    _print(record, data, path)
    _track(settings, context, record, [path, *plots])
    return PredictResult(record, path, plots)


def open_for(saved: SavedRun, settings: Settings, context: RunContext) -> tuple[DataSet, bool]:
    """Return the data that a command line names for a run's model, and whether they are others.

    They are the run's own where no setting of the data is given that the run did not have, and
    what they hold has not changed since.
    """
    own = saved.settings.arguments["data"]
    composed = settings.arguments["data"]
    earlier = (load_launch(saved.run_dir) or {}).get("overrides", ())
    now = {key(line) for line in context.launch.get("overrides", ()) if line not in earlier}
    if {"data", "data._target_"} & now:
        arguments = dict(composed)
    else:
        names = {name.split(".")[1] for name in now if name.startswith("data.")}
        arguments = {**own, **{name: composed[name] for name in names if name in composed}}
    chosen = replace(saved.settings, arguments={**saved.settings.arguments, "data": arguments})
    is_new = any(arguments.get(name) != own.get(name) for name in {*arguments, *own} - HOW)
    if not is_new:
        data = data_for(chosen, {}, None)
        if saved.recipe["fingerprint"] in (None, data.fingerprint()):
            return data, False
        print("note: the data have changed since the training: all of them are predicted")
    return data_for(chosen, {}, saved.transforms), True


def split_of(node: PredictConfig, data: DataSet, is_new: bool) -> Split:
    """Return the split to predict.

    Raises:
        ConfigError: it has no samples.

    """
    split = cast(Split, node.split or "test")
    if data.size(split) == 0:
        why = (
            "of other data than the training's, all is of the split test"
            if is_new
            else "choose another"
        )
        raise ConfigError(f"predict.split={split}: it has no samples; {why}")
    return split


def format_of(node: PredictConfig, data: DataSet) -> str:
    """Return the format to write.

    Raises:
        ConfigError: the data set does not write it.

    """
    known = formats(data)
    if node.format is not None and node.format not in known:
        raise ConfigError(
            f"predict.format={node.format}: {type(data).__name__} does not write it; "
            f"{nearest(node.format, known)}"
        )
    return node.format or known[0]


def as_record(
    saved: SavedRun, data: DataSet, split: Split, kept: Accumulator, skipped: int
) -> dict[str, Any]:
    """Return the content of ``predict.json``; figures that nothing was measured for are absent."""
    figures = {name: value for name, value in figures_of(kept).items() if math.isfinite(value)}
    return {
        "run": str(saved.run_dir),
        "step": saved.step,
        "split": split,
        "samples": data.size(split),
        "skipped_samples": skipped,
        "metrics": figures,
        "metrics_meta": [metric.as_dict() for metric in data.metrics],
        "data_fingerprint": data.fingerprint(),
    }


def _print(record: Mapping[str, Any], data: DataSet, path: Path) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("measure")
    table.add_column("value", justify="right")
    figures = record["metrics"]
    for metric in data.metrics:
        if metric.name in figures:
            table.add_row(metric.label, metric.text(figures[metric.name]))
    print(f"predicted: {record['samples']:,} samples with the weights of step {record['step']}")
    if figures:
        print_table(table)
    else:
        print("nothing was measured of what is predicted, so there are no errors to show")
    print(f"predictions: {path}")


def _track(
    settings: Settings, context: RunContext, record: Mapping[str, Any], files: list[Path]
) -> None:
    """Record the prediction beside the runs."""
    tracker = open_tracker(settings.tracking, context.run_dir, context.parent_dir)
    tags = {"kind": "predict", "run_dir": str(context.run_dir), "of": record["run"]}
    tracker.start(f"predict-{context.run_dir.name}", {"split": record["split"]}, tags)
    tracker.metrics({f"predict/{k}": v for k, v in record["metrics"].items()}, record["step"])
    for path in files:
        tracker.artifact(path, path.parent.name)
    tracker.artifact(context.run_dir / FILE_NAME)
    tracker.finish("FINISHED")
