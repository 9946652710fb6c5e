"""Pictures: ticks at round numbers, curves that differ without colours, legends clear of them."""

import json

import numpy as np
import pytest
from PIL import Image, ImageDraw

import common


@pytest.mark.parametrize("low, high", [(0, 1), (0, 17), (-3.2, 0.001), (12.4, 12.9), (0, 1e-7),
                                       (1, 3e6), (-5, 5), (0.1, 0.10001)])
@pytest.mark.parametrize("most", [3, 5, 9])
def test_ticks_are_round_and_within(low, high, most):
    ticks = common.round_numbers(low, high, most)
    assert 2 <= len(ticks) <= most or most == 3 and len(ticks) >= 1
    slack = (high - low) * 1e-6
    assert low - slack <= ticks[0] and ticks[-1] <= high + slack
    step = (ticks[-1] - ticks[0]) / max(1, len(ticks) - 1) or abs(ticks[0])
    digits = step / 10 ** np.floor(np.log10(step) + 1e-9)
    assert len(ticks) == 1 or min(abs(digits - k) for k in (1, 2, 2.5, 5)) < 1e-6
    assert np.allclose(ticks / step, np.round(ticks / step)) or len(ticks) == 1


def inked(picture):
    """(H, W) whether a pixel of a picture is dark: no paper, no grid."""
    return np.asarray(picture.convert("L")) < 200


@pytest.mark.parametrize("on, off", [(9, 0), (9, 4), (2, 3)])
@pytest.mark.parametrize("points", [2, 11, 500])
def test_dashes_do_not_depend_on_how_many_points_a_line_has(on, off, points):
    picture = Image.new("RGB", (520, 20), "white")
    x = np.linspace(5, 505, points)
    common.dashed(ImageDraw.Draw(picture), [(a, 10.0) for a in x], on, off, "black", 1)
    row = inked(picture)[10, 5:505]
    starts = np.flatnonzero(row[1:] & ~row[:-1])
    assert row.mean() == pytest.approx(on / (on + off), abs=0.25 if off == 3 else 0.15)
    if off:
        assert np.abs(np.diff(starts) - (on + off)).max() <= 1
    else:
        assert row.all()


def test_curves_differ_without_their_colours_and_the_legend_is_clear_of_them():
    picture = Image.new("RGB", (900, 300), "white")
    x = np.linspace(0, 10, 60)
    lines = {f"curve {k}": np.full(60, 0.1 + 0.2 * k) for k in range(5)}
    common.draw_panel(ImageDraw.Draw(picture), (60, 40, 880, 240), x, lines, "seconds", [4.0],
                      (0.0, 1.0))
    ink, shares = inked(picture), []
    assert ink[22:39].any() and ink[255:280].any()            # legend, name of the axis
    for k in range(5):
        y = round(240 - (0.1 + 0.2 * k) * 200)
        shares.append(tuple(np.diff(np.flatnonzero(np.diff(ink[y, 100:360]))[:6])))
    assert len(set(shares)) == 5                              # patterns of dashes
    red = np.asarray(picture)[:, :, 0].astype(int) - np.asarray(picture)[:, :, 1] > 100
    assert red[50:230, 60 + 4 * 82 - 2:60 + 4 * 82 + 3].any(1).mean() > 0.9


@pytest.mark.parametrize("rows", [[], [{"step": 0, "loss": 2.0}],
                                  [{"step": k, "loss": 1.0, "lr": 0.1} for k in range(300)],
                                  [{"step": 3, "loss": float("nan")}, {"step": 4, "loss": 1e9}]])
def test_a_curve_is_drawn_of_any_log(tmp_path, rows):
    (tmp_path / "log.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in rows))
    common.draw_curve(tmp_path, "a title", ["loss", "top1", "lr"])
    picture = Image.open(tmp_path / "curve.png")
    panels = len({k for r in rows for k in r} & {"loss", "lr"})
    assert picture.size == (760, 30 + 220 * max(1, panels))
    assert not panels or inked(picture)[40:].any()
