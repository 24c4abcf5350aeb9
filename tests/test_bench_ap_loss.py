"""examples/bench_ap_loss.py at tiny sizes: its loop is what ops.ap_loss computes, and what is told follows from what was measured."""
import importlib
import json
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tinydet import use
from tinydet.ops.ap_loss import ap_loss

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
bench, timing = map(importlib.import_module, ("bench_ap_loss", "timing"))
SMALL = ["--positives", "3", "20", "--negatives", "60", "--large", "4", "500", "--turns", "3", "--threads", "1"]


@pytest.fixture(autouse=True)
def no_torch(monkeypatch):
    """As without PyTorch, whose threads the other tests should not meet."""
    monkeypatch.setitem(sys.modules, "torch", None)


@pytest.fixture
def torch(monkeypatch):
    """A stand-in for PyTorch: NumPy under its name."""
    module = types.ModuleType("torch")
    module.__dict__.update({name: getattr(np, name) for name in ("clip", "argsort", "zeros_like")})
    module.from_numpy = lambda a: SimpleNamespace(to=lambda device: a)
    module.set_num_threads, module.get_num_threads, module.__version__ = (lambda n: module.asked.append(n)), (lambda: module.asked[-1]), "0.1"
    module.asked = []
    monkeypatch.setitem(sys.modules, "torch", module)
    return module


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("delta", [0.5, 1, 2])
@pytest.mark.parametrize("seed", range(8))
def test_the_loop_is_ap_loss_on_ties_too(seed, delta, in_place):
    rng = np.random.default_rng(seed)
    s, t = 2 * rng.standard_normal(80), rng.choice([-1, 0, 1], 80, p=(0.1, 0.6, 0.3)).astype(np.int8)
    s = s if seed < 2 else np.round(s * 2) / 2                      # ties, and differences of just delta
    before, (loss, g) = s.copy(), ap_loss(s, t, delta)
    value, update = bench.loop(np, s, t, delta, in_place)
    assert_allclose(value, loss, rtol=0, atol=1e-12)
    assert_allclose(update, g, rtol=0, atol=1e-12)
    assert_array_equal(s, before)
    value, update = bench.loop(np, s.astype(np.float32), t, delta, in_place)
    assert update.dtype == np.float32 and abs(value - loss) < 2e-6 and np.abs(update - g).max() < 2e-6


def test_a_sample_is_what_the_docstring_says():
    s, t = bench.sample(3000, 20000, 1)
    assert s.dtype == np.float32 and t.dtype == np.int8 and s.shape == t.shape == (23000,) and (t == 1).sum() == 3000 and (t == 0).sum() == 20000
    for label, mean in ((1, 1), (0, -4)):
        assert abs(s[t == label].mean() - mean) < 0.1 and abs(s[t == label].std() - 1.5) < 0.1
    assert 0.4 < t[:11500].sum() / 3000 < 0.6                       # in random order
    double, same = bench.sample(3000, 20000, 1, "float64")
    assert_allclose(double, s, atol=2e-6)
    assert_array_equal(same, t)


def test_a_run_tells_and_writes_all(tmp_path, probes, capsys):
    asked, path = probes(EXAMPLES / "bench_ap_loss.py", 4e-3), tmp_path / "a.json"
    args = bench.arguments([*SMALL, "--seed", "3", "--json", str(path)])
    with use("numba") as put:
        result = bench.main(args, put)
    assert json.loads(path.read_text()) == result                   # keys that are text, numbers that are plain
    assert set(result) == {"settings", "date", "turns", "time", "agreement", "torch", "sums off", "memory"} and result["torch"] is None
    assert {k: result["settings"][k] for k in ("positives", "negatives", "large", "turns", "seed", "dtype", "backend", "threads")} == {
        "positives": [3, 20], "negatives": 60, "large": [4, 500], "turns": 3, "seed": 3, "dtype": "float32", "backend": "numba", "threads": 1}
    assert {"cores", "numba threads", "environment", "versions"} <= set(result["settings"])
    loops, growth = {"ours", "numpy loop", "numpy loop in place"}, {"P=3", "P=6", "P=12", "P=24", "N=120", "N=240", "N=480"}
    assert {row: set(t) for row, t in result["turns"].items()} == {"P=3": loops, "P=20": loops, "large": {"ours", "sort"}, "growth": growth}
    assert not any("." in key for row, t in result["turns"].items() for key in (row, *t))       # claims.py splits paths there
    assert all(len(t) == 3 and min(t) > 0 for forms in result["turns"].values() for t in forms.values())
    for row, base in (("P=3", "ours"), ("P=20", "ours"), ("large", "sort"), ("growth", "P=3")):
        turns = result["turns"][row]
        assert result["time"][row] == timing.told(turns, [(name, base) for name in turns if name != base])
    assert {row: set(found) for row, found in result["agreement"].items()} == {"P=3": {"float32", "float64"}, "P=20": {"float32", "float64"}}
    assert max(result["agreement"]["P=20"]["float64"].values()) < 1e-12 and 0 <= result["sums off"] < 1e-5
    assert [a["form"] for a in asked] == ["ours", "sort"] and all(a["large"] == [4, 500] and a["seed"] == 3 for a in asked)
    memory, MB = result["memory"], 504 * 4 / 2**20
    assert memory["input MB"] == {"scores": MB, "labels": MB / 4} and memory["MB"]["sort"] == {"traced": 8e-3, "resident": 2e-3}
    assert memory["ratio"]["ours"] == {"traced": 4e-3 / MB, "resident": 2e-3 / MB}
    out = capsys.readouterr().out
    assert "PyTorch is not installed" in out and "all forms agree" in out and "not for quoting" in out and "memory traced" in out


def test_with_pytorch_and_one_part_alone(torch, capsys):
    with use("numba") as put:
        result = bench.main(bench.arguments([*SMALL, "--only", "loop", "--dtype", "float64"]), put)
    assert set(result["turns"]) == {"P=3", "P=20"} and "memory" not in result and "not installed" not in capsys.readouterr().out
    assert set(result["turns"]["P=20"]) == {"ours", *(f"{name} loop{how}" for name in ("numpy", "torch") for how in ("", " in place"))}
    assert result["torch"] == {"version": "0.1", "threads": 1} and torch.asked == [1]


def test_forms_that_differ_are_not_timed(monkeypatch):
    right, (s, t) = bench.loop, bench.sample(5, 50, 0, "float64")

    def wrong(xp, scores, labels, delta=1.0, in_place=False):
        value, g = right(xp, scores, labels, delta, in_place)
        return value, g * (1 + 1e-11 * in_place)

    monkeypatch.setattr(bench, "loop", wrong)
    with use("numba") as put, pytest.raises(ValueError, match="all forms must agree to 1e-12 in float64, got 1e-11 for the numpy loop in place"):
        bench.agree(s, t, put, None)
    monkeypatch.setattr(bench, "ap_loss", lambda x, y: (0.5, np.where(y == 1, -0.1, 0.01)))
    assert bench.balanced(s, t) < 1e-12                             # 5 and 50 of them
    monkeypatch.setattr(bench, "ap_loss", lambda x, y: (0.5, np.where(y == 1, -0.1, 0.011)))
    with pytest.raises(ValueError, match="g must add up to -loss and .loss, got a loss of 0.5 and sums that are off by 0.05"):
        bench.balanced(s, t)


def test_memory_counts_the_result():
    args = bench.arguments([*SMALL, "--large", "50", "400000"])
    with use("numba") as put:
        found = {form: bench.probe(form, args, put) for form in ("ours", "sort")}
    size = 400050 * 4 / 2**20
    assert size < found["sort"]["traced"] < 1.1 * size and size < found["ours"]["traced"] < 4 * size and all(f["resident"] >= 0 for f in found.values())


@pytest.mark.parametrize("args, message", [
    (["--turns", "0"], "--turns must be at least 1, got 0"), (["--positives", "5", "0"], "--positives must be at least 1, got [5, 0]"),
    (["--seed", "-1"], "--seed must be at least 0"), (["--json", "none/a.json"], "folder of --json none/a.json must exist"),
    (["--only", "x"], "--only"), (["--large", "5"], "--large")])
def test_wrong_arguments_are_named_before_measuring(args, message, capsys):
    with pytest.raises(SystemExit):
        bench.arguments(args)
    assert message in capsys.readouterr().err
