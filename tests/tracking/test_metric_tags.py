from __future__ import annotations

import json

from expt.job import Metric
from expt.tracking.metric_tags import metrics_of_tags, tags_of_metrics
from expt.tracking.store import TAG_LENGTH


def test_few_metrics_are_one_tag_of_what_differs_from_the_defaults() -> None:
    metrics = [Metric("accuracy", goal="max", percent=True), Metric("loss")]
    tags = tags_of_metrics([metric.as_dict() for metric in metrics])
    brief = [{"name": "accuracy", "goal": "max", "percent": True}, {"name": "loss"}]
    assert {name: json.loads(text) for name, text in tags.items()} == {"metrics": brief}
    assert [Metric.from_dict(one) for one in metrics_of_tags(tags)] == metrics


def test_many_metrics_are_several_tags_none_of_which_a_store_cuts() -> None:
    metrics = [Metric(f"accuracy of the class {n}", "max", f"class {n}") for n in range(500)]
    tags = tags_of_metrics([metric.as_dict() for metric in metrics])
    assert list(tags) == ["metrics", *(f"metrics.{n}" for n in range(1, len(tags)))]
    assert 3 < len(tags) < 8 and max(map(len, tags.values())) <= TAG_LENGTH
    assert [Metric.from_dict(one) for one in metrics_of_tags(tags)] == metrics


def test_what_was_cut_or_never_written_describes_nothing() -> None:
    whole = json.dumps([Metric("accuracy", "max").as_dict()])  # of an earlier version
    assert [Metric.from_dict(one) for one in metrics_of_tags({"metrics": whole})] == [
        Metric("accuracy", "max")
    ]
    assert metrics_of_tags({"metrics": whole[:-5]}) == metrics_of_tags({}) == []
