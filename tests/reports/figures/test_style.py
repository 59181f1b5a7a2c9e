from __future__ import annotations

import struct

from expt.reports.figures.style import DOTS_PER_INCH, WIDTH_INCHES, byte_unit, draw
from expt.units import GIB, MIB


def test_a_figure_is_written_twice_in_the_size_asked_for(tmp_path) -> None:
    paths = draw(tmp_path / "plots", "empty", 2.0, lambda figure: None)
    assert [path.name for path in paths] == ["empty.png", "empty.pdf"]
    width, height = struct.unpack(">II", paths[0].read_bytes()[16:24])
    assert (width, height) == (WIDTH_INCHES * DOTS_PER_INCH, 2 * DOTS_PER_INCH)


def test_the_same_figure_is_the_same_file(tmp_path) -> None:
    first = [path.read_bytes() for path in draw(tmp_path, "a", 2.0, lambda figure: None)]
    again = [path.read_bytes() for path in draw(tmp_path, "a", 2.0, lambda figure: None)]
    assert first == again


def test_the_look_ends_with_the_figure(tmp_path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    draw(tmp_path, "a", 2.0, lambda figure: None)
    assert dict(matplotlib.rcParams) == before


def test_the_unit_goes_by_the_largest() -> None:
    assert byte_unit([10 * MIB, None, GIB]) == ("GiB", GIB)
    assert byte_unit([10 * MIB, 400 * MIB]) == ("MiB", MIB)
    assert byte_unit([]) == ("MiB", MIB)
