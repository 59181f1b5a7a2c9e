from __future__ import annotations

import pytest

from expt.errors import ConfigError
from expt.job import Metric, monitored


@pytest.mark.parametrize("name", ["iou/road", "recall@10", "", "..", "f1:macro", "a\n"])
def test_a_metric_whose_name_would_not_be_read_back_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"made of letters, digits, '_', '-', '\.' and blanks"):
        monitored([Metric("loss"), Metric(name, goal="max")], None)


def test_a_metric_of_legal_characters_can_be_monitored() -> None:
    metric = Metric("top-5 acc_1.0", goal="max")
    assert monitored([Metric("loss"), metric], metric.name) is metric
