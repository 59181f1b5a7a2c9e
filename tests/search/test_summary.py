from __future__ import annotations

from expt.search.winner import FILE_NAME, SweepSummary


def test_it_is_written_and_read_back(tmp_path):
    best = {"trial": 1, "params": {"x": 0.5}, "val/mae": 3.0, "peak_allocated_bytes": 5}
    summary = SweepSummary("mine", 4, finished=2, best=best, pareto=[best])
    summary.save(tmp_path)
    assert SweepSummary.load(tmp_path) == summary


def test_what_cannot_be_read_is_none(tmp_path):
    assert SweepSummary.load(tmp_path) is None
    (tmp_path / FILE_NAME).write_text("{")
    assert SweepSummary.load(tmp_path) is None
    (tmp_path / FILE_NAME).write_text('{"strange": 1}')
    assert SweepSummary.load(tmp_path) is None


def test_what_a_later_version_wrote_besides_is_left_out(tmp_path):
    SweepSummary("mine", 4).save(tmp_path)
    path = tmp_path / FILE_NAME
    path.write_text(path.read_text().replace("{", '{"of_tomorrow": 1,', 1))
    assert SweepSummary.load(tmp_path) == SweepSummary("mine", 4)
