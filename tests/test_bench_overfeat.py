"""examples/bench_overfeat.py on narrow nets: what is compared, what makes it fail, and that what is told follows from what was measured."""
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from tinydet import use
from tinydet.models import overfeat

FILE = Path(__file__).resolve().parent.parent / "examples" / "bench_overfeat.py"
sys.path.insert(0, str(FILE.parent))
bench, timing = map(importlib.import_module, ("bench_overfeat", "timing"))
SMALL = ["--quick", "--table", "small", "--sample", "6", "--batch", "4", "--turns", "2"]


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(bench, "CLASSES", 5)


def narrow(*more, kind=overfeat.Spec, dtype="float64"):
    """Arguments, a net and its scaled images."""
    args = bench.arguments([*SMALL, *more])
    with use("numba") as put:
        net = bench.make(args, put, kind, dtype, args.width)
        return args, net, bench.scaled(net, bench.photograph(args), args, put)


@pytest.mark.parametrize("table, window", [("small", 82), ("fast", 327), ("accurate", 317)])       # notes, 1.3
def test_without_padding_windows_alone_are_the_fine_map(table, window):
    args = bench.arguments([*SMALL, "--table", table, "--sample", "2"])
    with use("numba") as put:
        found = bench.agree(bench.make(args, put, bench.PaddingFree, "float64", args.width), bench.photograph(args), args, put)
        assert (found["net"], found["window"], found["sample"], found["dtype"]) == ("padding-free", window, 2, "float64")
        assert found["width"] == (1 / 4 if table == "small" else 1 / 32)
        assert set(found["apart"]) == {"crops", "blocks"} and all(set(off) == set(bench.ROUTES) for off in found["apart"].values())
        assert all(0 <= v < 1e-13 for off in found["apart"].values() for v in off.values())
        padded = bench.agree(bench.make(args, put, overfeat.Spec, "float64", args.width), bench.photograph(args), args, put)
    assert padded["net"] == "padded" and padded["window"] == overfeat.TABLES[table].window
    assert max(padded["apart"]["blocks"].values()) < 1e-13 and min(padded["apart"]["crops"].values()) > 1e-3


def test_crops_are_what_net_forward_says_of_the_window():
    _, net, xs = narrow()
    rows = np.array([(0, 2, 1), (1, 0, 3), (1, 2, 0), (1, 5, 7), (1, 1, 1)])
    found = bench.crops(net, xs, rows, 2)                           # two, two and one
    corners = [(xs[s], *overfeat.windows(net.table, *overfeat.outputs(net.table, *xs[s].shape[1:3]).fine).reshape(
        *overfeat.outputs(net.table, *xs[s].shape[1:3]).fine, 4)[r, c].astype(int)) for s, r, c in rows]
    assert_allclose(found, [net.forward(x[:, y1:y2, x1:x2], heads=("classifier",))[0][0, 0, 0] for x, x1, y1, x2, y2 in corners], rtol=1e-12)
    maps = bench.fine(net, xs, "offsets")
    assert_allclose(bench.blocks(net, xs, rows), [maps[s][0, r, c] for s, r, c in rows], rtol=0, atol=1e-13 * np.abs(maps[1]).max())


def test_windows_are_those_of_table_5_and_the_sample_is_drawn_from_all():
    table, xs = overfeat.TABLES["accurate"], [np.empty((1, H, W, 0)) for H, W in overfeat.TEST_SIZES]
    found = bench.windows(table, xs)
    assert [(found[:, 0] == s).sum() for s in range(6)] == [9, 54, 135, 315, 432, 630]              # notes, 3.2
    assert found[:4].tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0]] and found[-1].tolist() == [5, 20, 29]
    rows, total = bench.draw(table, xs, bench.arguments(["--sample", "300"]))
    assert total == 1575 and len(np.unique(rows, axis=0)) == 300 and set(rows[:, 0]) == set(range(6))
    again, other = (bench.draw(table, xs, bench.arguments(["--sample", "300", "--seed", seed]))[0] for seed in "01")
    assert_array_equal(rows, again)
    assert not np.array_equal(rows, other)
    everything, _ = bench.draw(table, xs, bench.arguments(["--sample", "9999"]))
    assert_array_equal(everything, found)


def test_extrapolation_and_ratios_by_hand():
    turns = {"offsets": [2.0, 4.0, 2.0], "dilated": [1.0, 1.0, 4.0], "crops": [0.16, 0.32, 0.08]}
    seconds = bench.extrapolated(turns, 16, 1600)
    assert seconds == {**turns, "crops": pytest.approx([16.0, 32.0, 8.0])} and turns["crops"] == [0.16, 0.32, 0.08]
    told = timing.told(seconds, bench.PAIRS)
    assert told["ratio"] == pytest.approx({"crops / offsets": 8.0, "crops / dilated": 16.0, "offsets / dilated": 2.0})
    assert told["quartiles"]["crops / offsets"] == pytest.approx([6.0, 8.0])                        # of 8, 8, 4
    memory = bench.memory_told({"offsets": {"traced": 10.0}, "dilated": {"traced": 30.0}, "crops": {"traced": 70.0}}, 10.0)
    assert memory["ratio"] == {"crops / offsets": {"traced": 4.0}, "crops / dilated": {"traced": 2.0}, "offsets / dilated": {"traced": 0.5}}


def test_multiply_adds_by_hand():
    net = SimpleNamespace(table=overfeat.Table((("conv1", 2, 1, 1, 0, 1), ("conv2", 3, 2, 1, 0, 2)), 2, (("fc3", 4),)), spec=SimpleNamespace(width=1.0))
    found = bench.work(net, [np.empty((1, 5, 6, 0))], 2)            # windows of 5: two
    trunk, wide, head = 5 * 5 * 3 * 2 + 4 * 4 * 4 * 2 * 3, 5 * 6 * 3 * 2 + 4 * 5 * 4 * 2 * 3, 4 * 3 * 4 + 4 * bench.CLASSES
    assert found == {"dense": wide + 2 * head, "crops": 2 * (trunk + head)}


def test_a_run_tells_and_writes_all(tmp_path, capsys, probes):
    asked, path = probes(FILE), tmp_path / "a.json"
    args = bench.arguments([*SMALL, "--seed", "3", "--json", str(path)])
    with use("numba") as put:
        result = bench.main(args, put)
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    assert set(result) == {"settings", "date", "agreement", "extrapolation", "turns", "time", "multiply-adds", "memory"}
    assert [a["form"] for a in asked] == list(bench.FORMS) and all(a["seed"] == 3 and a["table"] == "small" and a["quick"] for a in asked)
    assert {k: result["settings"][k] for k in ("quick", "sample", "batch", "turns", "seed", "table", "backend", "image", "width")} == {
        "quick": True, "sample": 6, "batch": 4, "turns": 2, "seed": 3, "table": "small", "backend": "numba", "image": None, "width": 1 / 4}
    assert [(a["net"], a["dtype"]) for a in result["agreement"]] == [(n, d) for d in ("float64", "float32") for n in ("padding-free", "padded")]
    assert all(len(result["turns"][k]) == 2 and min(result["turns"][k]) > 0 for k in bench.FORMS)
    assert result["time"] == timing.told(bench.extrapolated(result["turns"], 6, 63), bench.PAIRS)
    way = result["extrapolation"]
    assert way["extrapolated"] is True and (way["sample"], way["windows"], way["factor"], way["batch"]) == (6, 63, 10.5, 4)
    assert way["sample seconds"] == pytest.approx(result["time"]["seconds"]["crops"] / 10.5)
    assert result["memory"]["MB"]["crops"] == {"traced": 30.0, "resident": 5.0} and 0 < result["memory"]["weights MB"] < 0.2
    out = capsys.readouterr().out
    assert "EXTRAPOLATED to 63 windows from 6," in out and "not for quoting" in out and "a crop sees zeros where the slid net sees pixels" in out
    assert [s.split()[0] for s in out.splitlines() if s.startswith(bench.FORMS)] == list(bench.FORMS)


def test_all_windows_are_no_extrapolation(monkeypatch, capsys):
    monkeypatch.setattr(timing, "probe_of", lambda *a: {"traced": 1.0, "resident": 1.0})
    args = bench.arguments([*SMALL, "--sample", "1000", "--batch", "64", "--turns", "1"])
    with use("numba") as put:
        result = bench.main(args, put)
    assert result["extrapolation"]["extrapolated"] is False and result["extrapolation"]["factor"] == 1
    assert result["time"]["seconds"]["crops"] == result["turns"]["crops"][0]
    assert "EXTRAPOLATED" not in capsys.readouterr().out


def swapped(net, x, route="offsets", heads=(), dense=overfeat.OverFeat.dense):
    F = dense(net, x, route, heads)[0].copy()
    F[:, ::3, ::3] = dense(net, x, "offsets", heads)[0][:, 1::3, ::3]           # one offset has the map of another
    return F, None


def scaled(net, x, route="offsets", heads=(), dense=overfeat.OverFeat.dense):
    return dense(net, x, route, heads)[0] * (1.001 if route == "dilated" else 1), None


def not_a_number(net, x, route="offsets", heads=(), dense=overfeat.OverFeat.dense):
    return dense(net, x, route, heads)[0] * np.nan, None


@pytest.mark.parametrize("broken, route", [(swapped, "offsets"), (scaled, "dilated"), (not_a_number, "offsets")])
@pytest.mark.parametrize("kind, name", [(bench.PaddingFree, "padding-free"), (overfeat.Spec, "padded")])
@pytest.mark.parametrize("dtype, limit", [("float64", "1e-10"), ("float32", "0.0001")])
def test_maps_that_differ_are_not_timed(monkeypatch, broken, route, kind, name, dtype, limit):
    args, net, _ = narrow("--sample", "63", kind=kind, dtype=dtype)
    monkeypatch.setattr(overfeat.OverFeat, "dense", broken)
    with pytest.raises(ValueError, match=rf"bench_overfeat: the {name} net's fine map \({route}\) and blocks must agree to {limit} in {dtype}, got"):
        bench.agree(net, bench.photograph(args), args, lambda x: x)


def test_crops_that_differ_from_a_padding_free_net_are_not_timed(monkeypatch):
    args, net, _ = narrow(kind=bench.PaddingFree)
    monkeypatch.setattr(bench, "crops", lambda *a, crops=bench.crops: crops(*a) * (1 + 1e-6))
    with pytest.raises(ValueError, match=r"the padding-free net's fine map \(offsets\) and crops must agree to 1e-10 in float64"):
        bench.agree(net, bench.photograph(args), args, lambda x: x)


def test_maps_of_nothing_but_zeros_show_nothing():
    args, net, _ = narrow()
    for name in ("w", "b"):
        net.params[f"classifier.out.{name}"][...] = 0
    with pytest.raises(ValueError, match="bench_overfeat: the maps must not be 0 everywhere"):
        bench.agree(net, bench.photograph(args), args, lambda x: x)


def test_memory_of_a_form(monkeypatch):
    built = []
    monkeypatch.setattr(bench, "make", lambda *a, make=bench.make, **more: built.append(more["width"]) or make(*a, **more))
    args = bench.arguments([*SMALL, "--sample", "64"])
    args.width = 1 / 2
    with use("numba") as put:
        few, many = (bench.probe("crops", SimpleNamespace(**{**vars(args), "batch": batch}), put)["traced"] for batch in (1, 32))
        assert built == [1 / 4, 1 / 2] * 2 and few > 0       # the narrow net compiles
        assert many - few > 31 * 60 * 60 * 3 * 4 / 2**20            # the windows' pixels at least
        assert bench.probe("dilated", args, put)["resident"] >= 0


def test_a_photograph_of_ones_own(tmp_path):
    path = tmp_path / "portrait.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 60, 3), np.uint8)).save(path)
    _, net, xs = narrow("--image", str(path))
    assert [x.shape[1:3] for x in xs] == [size[::-1] for size in net.table.sizes[:2]] and len(bench.windows(net.table, xs)) == 9 + 54
    assert bench.photograph(bench.arguments([])).shape == (480, 640, 3)


@pytest.mark.parametrize("args, message", [
    (["--turns", "0"], "--turns must be at least 1, got 0"), (["--sample", "0"], "--sample must be at least 1"), (["--batch", "0"], "--batch must"),
    (["--seed", "-1"], "--seed must be at least 0"), (["--json", "none/a.json"], "folder of --json none/a.json must exist"), (["--table", "x"], "--table")])
def test_wrong_arguments_are_named_before_measuring(args, message, capsys):
    with pytest.raises(SystemExit):
        bench.arguments(args)
    assert message in capsys.readouterr().err
