"""examples/bench_oquab.py on narrow nets: what is compared, what makes it fail, and that what is told follows from what was measured."""
import functools
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tinydet import use
from tinydet.models import oquab, oquab_weak

FILE = Path(__file__).resolve().parent.parent / "examples" / "bench_oquab.py"
sys.path.insert(0, str(FILE.parent))
bench, timing = map(importlib.import_module, ("bench_oquab", "timing"))
SMALL = ["--quick", "--sample", "5", "--turns", "2", "--threads", "1"]


@pytest.fixture(autouse=True)
def no_torch(monkeypatch):
    """As without PyTorch, whose threads the other tests should not meet."""
    monkeypatch.setitem(sys.modules, "torch", None)


@functools.cache
def made(*more):
    args = bench.arguments([*SMALL, *more])
    with use("numba") as put:
        return bench.make(args, put, 1 / 48, "float64")


def narrow(*more):
    """Arguments, a net and its inputs. Nothing may change them."""
    return bench.arguments([*SMALL, *more]), *made()


def test_counts_are_those_of_the_notes(tmp_path, capsys):
    path = tmp_path / "a.json"
    found = bench.main(bench.arguments(["--counts", "--json", str(path)]), None)
    counts = json.loads(path.read_text())["counts"]
    assert counts == found["counts"] and all(ours == notes for ours, notes in counts.values())
    assert counts["sides at 1400: conv1, conv1_pool, conv2_pool, conv5_pool, fc7"] == ["349/174/86/42/37"] * 2
    assert counts["parameters of features.fc6"][0] == "56,629,248" and counts["parameters of head.fcb of 3x3"][0] == "368,660"
    assert counts["parameters of source net, 6144 units, 1512 classes"][0] == "107,422,568" and counts["parameters of trunk"][0] == "3,747,200"
    assert counts["multiply-adds at 500 of features.fc6"][0] == "4.59 G" and counts["multiply-adds at 500 of all"][0] == "14.3 G"
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(counts) + 1 and [s.split()[-1] for s in lines[:12]] == ["/".join(map(str, sides)) for sides in bench.MAPS.values()]


def test_counts_that_differ_are_refused(monkeypatch):
    monkeypatch.setitem(bench.PARAMETERS, "head.fca", 7)
    with pytest.raises(ValueError, match="bench_oquab: all must be as in the notes, got parameters of head.fca: 12,584,960, not 7$"):
        bench.counts()


def test_net_and_inputs_are_the_papers():
    _, net, xs = narrow()
    assert net.spec.head == "weak" and net.table is oquab.TABLES["6144"] and net.spec.outputs == 20 and net.spec.adapt is None
    assert net.params["features.fc6.w"].shape == (6, 6, 5, 128) and all(np.ptp(a) > 0 for name, a in net.params.items())
    assert {s: x.shape for s, x in xs.items()} == {"0.5": (1, 250, 250, 3), "0.7": (1, 350, 350, 3), "1": (1, 500, 500, 3)}
    assert 20 < xs["1"].std() < 100 and abs(xs["1"].mean()) < 60    # not divided: LRN sees values of the papers' size
    full = bench.arguments([])
    assert (full.width, full.turns, full.quick) == (1.0, 20, False) and oquab_weak.SCALES == (0.5, 0.7, 1, 1.4, 2, 2.8)
    assert [oquab.map_side(net.table, int(s * bench.SIDE)) for s in oquab_weak.SCALES] == [1, 4, 9, 15, 25, 37]
    other, others = made("--seed", "1")
    assert not any(np.array_equal(a, net.params[k]) for k, a in other.params.items()) and not np.array_equal(others["1"], xs["1"])


def test_without_padding_crops_are_the_cells_of_the_map(monkeypatch):
    bare = oquab.Table(tuple((*row[:4], 0, *row[5:]) for row in oquab.TABLES["6144"].convs), 1, oquab.TABLES["6144"].hidden)
    monkeypatch.setitem(oquab.TABLES, "6144", bare)                 # all that a cell sees is its window, 195 pixels
    args, x = bench.arguments([*SMALL, "--sample", "7"]), narrow()[2]["1"]
    net = oquab.Oquab(oquab.Spec(tuple("abc"), "6144", "weak", 1 / 48, std=1.0), np.random.default_rng(0), np.float64)
    cells, F, n = bench.draw(net, x, args), net(x), oquab.map_side(bare, 500)
    assert (bare.window, n, cells.shape) == (195, 10, (2, 7))
    assert_allclose(bench.crops(net, x, cells), F[0, cells[0], cells[1]], rtol=0, atol=1e-12 * np.abs(F).max())
    assert not np.allclose(bench.crops(net, x, cells[::-1]), F[0, cells[0], cells[1]], rtol=0, atol=1e-3 * np.abs(F).max())


def test_cells_are_drawn_from_all():
    args, net, xs = narrow("--sample", "60")
    cells = bench.draw(net, xs["1"], args)
    assert cells.shape == (2, 60) and len(np.unique(cells, axis=1).T) == 60 and cells.min() == 0 and cells.max() == 8
    assert_array_equal(bench.draw(net, xs["0.7"], args), np.indices((4, 4)).reshape(2, 16))             # all there are
    assert bench.draw(net, xs["0.5"], args).tolist() == [[0], [0]]
    other = bench.draw(net, xs["1"], bench.arguments([*SMALL, "--sample", "60", "--seed", "1"]))
    assert not np.array_equal(other, cells)


def test_maps_that_differ_are_not_timed(monkeypatch):
    args, net, xs = narrow()
    x = xs["0.7"]
    apart = bench.agree(net, x, args, {"nchw": lambda x: lambda: net(x) * (1 + 5e-5)})
    assert apart["nchw"] == pytest.approx(5e-5) and 1e-3 < apart["crops"] < 3
    for wrong in (1 + 2e-4, np.nan):
        with pytest.raises(ValueError, match="bench_oquab: PyTorch's maps must be ours to 0.0001 of the largest value, got {'nchw'"):
            bench.agree(net, x, args, {"nchw": lambda x: lambda: net(x) * wrong})
    monkeypatch.setitem(bench.MAPS, 350, (86, 42, 20, 9, 5))
    with pytest.raises(ValueError, match=r"an input of 350 must give a map of 5x5 \(notes, sec. 4.1\), got \(1, 4, 4, 20\)"):
        bench.agree(net, x, args, {})


def test_a_run_tells_and_writes_all(tmp_path, monkeypatch, capsys, probes):
    asked, path = probes(FILE), tmp_path / "a.json"
    monkeypatch.setattr(bench, "torch_nets", lambda net, args: {layout: (lambda x: lambda: net(x)) for layout in bench.LAYOUTS})
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(__version__="0.1"))
    with use("numba") as put:
        result = bench.main(bench.arguments([*SMALL, "--seed", "3", "--json", str(path)]), put)
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    assert set(result) == {"settings", "date", "counts", "scales", "turns", "time", "memory"}
    order = ["slid", "nchw", "channels_last", "crops"]
    assert [a["form"] for a in asked] == order and all(a["seed"] == 3 and a["quick"] and a["width"] == 1 / 16 for a in asked)
    assert {k: result["settings"][k] for k in ("quick", "sample", "turns", "seed", "threads", "backend", "width", "torch")} == {
        "quick": True, "sample": 5, "turns": 2, "seed": 3, "threads": 1, "backend": "numba", "width": 1 / 16, "torch": "0.1"}
    assert {s: (r["input"], r["map"], r["windows"], r["sample"]) for s, r in result["scales"].items()} == {
        "0.5": (250, 1, 1, 1), "0.7": (350, 4, 16, 5), "1": (500, 9, 81, 5)}
    work = sum(oquab.multiply_adds(oquab.TABLES["6144"], 20, "weak", width=1 / 16, size=(350, 350)).values())
    assert result["scales"]["0.7"]["multiply-adds"] == work and set(result["scales"]["1"]["apart"]) == set(order[1:])
    turns, times = result["turns"], result["time"]
    assert all(len(turns[s][form]) == 2 and min(turns[s][form]) > 0 for s in turns for form in order)
    assert times["1"]["seconds"]["slid"] == np.median(turns["1"]["slid"])
    assert times["1"]["seconds"]["crops"] == pytest.approx(np.median(turns["1"]["crops"]) * 81 / 5)
    assert times["0.5"]["seconds"]["crops"] == np.median(turns["0.5"]["crops"])
    for form, factors in (("nchw", (1, 1, 1)), ("crops", (1, 16 / 5, 81 / 5))):
        sums = [sum(f * turns[s][form][t] for s, f in zip(turns, factors)) for t in range(2)]
        slid = [sum(turns[s]["slid"][t] for s in turns) for t in range(2)]
        assert times["all"]["seconds"][form] == pytest.approx(np.median(sums))
        assert times["all"]["ratio"][f"{form} / slid"] == pytest.approx(np.median(sums) / np.median(slid))
        assert times["all"]["quartiles"][f"{form} / slid"] == pytest.approx(np.quantile(np.divide(sums, slid), (0.25, 0.75)))
    assert result["memory"]["MB"]["crops"] == {"traced": 40.0, "resident": 5.0} and 1 < result["memory"]["weights MB"] < 3
    out = capsys.readouterr().out
    rows = [s.split() for s in out.splitlines()]
    assert ["0.7", "350", "4", "4", "16", f"{work / 1e9:.2f}"] in [r[:6] for r in rows]
    assert "crops: 98 windows, EXTRAPOLATED from 11" in out and "not for quoting" in out and "a crop sees zeros" in out


def test_without_pytorch_and_with_all_windows(monkeypatch, capsys):
    monkeypatch.setattr(timing, "probe_of", lambda *a: {"traced": 1.0, "resident": 1.0})
    monkeypatch.setattr(bench, "NARROW", 1 / 48)
    monkeypatch.setattr(oquab_weak, "SCALES", (0.5, 0.7))
    with use("numba") as put:
        result = bench.main(bench.arguments([*SMALL, "--sample", "16", "--turns", "1"]), put)
    assert result["settings"]["torch"] is None and set(result["time"]["all"]["seconds"]) == {"slid", "crops"}
    assert result["time"]["0.7"]["seconds"]["crops"] == result["turns"]["0.7"]["crops"][0]
    out = capsys.readouterr().out
    assert "PyTorch is left out: it is not installed (pip install torch)" in out and "EXTRAPOLATED" not in out and "crops: 17 windows\n" in out


def test_memory_of_a_form(monkeypatch):
    built = []
    monkeypatch.setattr(bench, "make", lambda args, put, width, make=bench.make: built.append(width) or make(args, put, width))
    monkeypatch.setattr(bench, "NARROW", 1 / 64)
    monkeypatch.setattr(oquab_weak, "SCALES", (1,))
    args = bench.arguments([*SMALL])
    args.width = 1 / 48
    with use("numba") as put:
        few, many = (bench.probe("crops", SimpleNamespace(**{**vars(args), "sample": n}), put)["traced"] for n in (1, 9))
        assert built == [1 / 64, 1 / 48] * 2 and many - few > 8 * 224 * 224 * 3 * 4 / 2**20             # the windows' pixels at least
        assert bench.probe("slid", args, put)["resident"] >= 0
        monkeypatch.setattr(bench, "torch_nets", lambda net, args, layouts: {layout: (lambda x: lambda: net(x)) for layout in layouts})
        assert set(bench.probe("nchw", args, put)) == {"resident"}  # what PyTorch asks for is not traced


WITH_TORCH = """
import sys
import numpy as np
sys.path.insert(0, sys.argv[1])
import bench_oquab as bench
from tinydet import use
args = bench.arguments(["--quick", "--threads", "1"])
with use("numba") as put:
    net, xs = bench.make(args, put, 1 / 48, "float64")
x = xs["0.7"]
models = bench.torch_nets(net, args)
apart = bench.agree(net, x, args, models)
assert list(apart) == ["nchw", "channels_last", "crops"] and max(apart["nchw"], apart["channels_last"]) < 1e-12, apart
assert list(bench.torch_nets(net, args, ("nchw",))) == ["nchw"]
import torch
assert torch.get_num_threads() == 1
for name, norm in ((n, leaf) for n, leaf in net.leaves().items() if n.endswith("norm")):
    norm.options = (*norm.options[:4], False)                       # another convention of LRN is seen
try:
    bench.agree(net, x, args, models)
except ValueError as error:
    assert "must be ours" in str(error)
    print("seen")
"""


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs PyTorch")
def test_pytorchs_net_is_ours():
    done = subprocess.run([sys.executable, "-c", WITH_TORCH, str(FILE.parent)], capture_output=True, text=True, timeout=200,
                          env={**os.environ, "NUMBA_NUM_THREADS": "1"})
    assert done.returncode == 0 and done.stdout.endswith("seen\n"), done.stderr[-2000:] + done.stdout


@pytest.mark.parametrize("args, message", [
    (["--turns", "0"], "--turns must be at least 1, got 0"), (["--sample", "0"], "--sample must be at least 1"),
    (["--threads", "0"], "--threads must be at least 1"), (["--seed", "-1"], "--seed must be at least 0"),
    (["--json", "none/a.json"], "folder of --json none/a.json must exist"), (["--backend", "x"], "--backend")])
def test_wrong_arguments_are_named_before_measuring(args, message, capsys):
    with pytest.raises(SystemExit):
        bench.arguments(args)
    assert message in capsys.readouterr().err
