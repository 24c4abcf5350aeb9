"""examples/bench_cpu.py at tiny sizes, without PyTorch, which is no dependency; with it where it is installed."""
import importlib.util
import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tinydet.ops import relu

PROGRAM = Path(__file__).resolve().parent.parent / "examples" / "bench_cpu.py"
sys.path.insert(0, str(PROGRAM.parent))                            # its timing.py
ROW = {"group": "conv", "ms": {"ours": 1.0}, "quartiles": {}}


@pytest.fixture(scope="module")
def no_torch(tmp_path_factory):
    """The environment of a machine without PyTorch."""
    folder = tmp_path_factory.mktemp("no_torch")
    (folder / "torch.py").write_text("raise ImportError('no PyTorch here')\n")
    return {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "NUMBA_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def bench():
    """The program's functions, as without PyTorch, whose threads the other tests should not meet."""
    spec = importlib.util.spec_from_file_location("bench_cpu", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch", None)
        spec.loader.exec_module(module)
    return module


def run(*args, cwd, env=None, code=0):
    done = subprocess.run([sys.executable, str(PROGRAM), *map(str, args)], cwd=cwd, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == code, done.stderr[-2000:]
    return done


def test_without_pytorch_and_going_on(no_torch, tmp_path):
    args = ["--quick", "--turns", 2, "--json", "a.json"]
    done = run("--only", "boxes", *args, cwd=tmp_path, env=no_torch)
    result = json.loads((tmp_path / "a.json").read_text())
    assert [r["part"] for r in result["rows"]] == ["nms 1k", "nms 1k", "nms 10k", "nms 10k", "nms 50k", "assign"] and "assign" in done.stdout
    assert all(set(r["ratio"]) == {"numpy"} and r["ms"]["ours"] > 0 for r in result["rows"])
    assert result["settings"]["versions"]["torch"] is None and result["sgemm GFLOP/s"] > 0 and "not for quoting" in done.stdout
    assert "OPENBLAS_THREAD_TIMEOUT" in result["settings"]["environment"]

    changed = {**result["rows"][0], "ms": {"ours": 123.0, "numpy": 246.0}, "ratio": {"numpy": 0.5}}      # to be known again
    (tmp_path / "a.json").write_text(json.dumps({**result, "rows": [changed, *result["rows"][1:-1]]}))
    done = run("--only", "boxes", "ops", "--match", "m", *args, cwd=tmp_path, env=no_torch)
    more = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert more[0] == changed and more[1:5] == result["rows"][1:-1] and done.stdout.count(", kept)") == 5
    assert {r["group"] for r in more} == {"boxes", "ops"} and all(r["ratio"] == {} for r in more if r["group"] == "ops")
    pool = next(r for r in more if r["row"] == "max_pool 2")
    assert set(pool["error"]["ours"]) == {"y", "dx"} and max(pool["error"]["ours"].values()) < 1e-5

    run("--only", "boxes", "--match", "nms 1k", "--fresh", *args, cwd=tmp_path, env=no_torch)
    assert json.loads((tmp_path / "a.json").read_text())["rows"][0]["ms"]["ours"] < 100
    assert "turns was 2, is 3" in run("--only", "boxes", *args, "--turns", 3, cwd=tmp_path, env=no_torch, code=1).stderr


@pytest.mark.parametrize("args, code, message", [
    (["--turns", "0"], 2, "--turns must be at least 1, got 0"), (["--threads", "-1"], 2, "--threads must be at least 1"),
    (["--json", "none/a.json"], 2, "folder of --json none/a.json must exist"),
    (["--show", "none.json"], 1, "none.json"),
    (["--json", "other.json"], 1, "other.json must be a file that --json wrote"),
    (["--show", "other.json"], 1, "other.json must be a file that --json wrote")])
def test_wrong_arguments_are_named(tmp_path, monkeypatch, capsys, args, code, message):
    (tmp_path / "other.json").write_text("[1]")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(sys, "argv", [str(PROGRAM), *args])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(PROGRAM), run_name="__main__")
    told = stop.value.code                                              # a text, which Python prints, is status 1
    assert (1 if isinstance(told, str) else told) == code and message in f"{told}{capsys.readouterr().err}"


def test_a_result_that_is_off_is_not_timed(bench):
    with pytest.raises(ValueError, match="ours is off by"):
        bench.op(relu.forward, lambda dy, cache: dy * (cache > 0) * (1 if dy.dtype == np.float64 else 1.001), {"x": (2, 3, 3, 4)})
    for values in ([1.0, 2.0], [1, 2]):
        with pytest.raises(ValueError, match="versions? differ"):
            bench.beside_numpy(lambda values=iter(values): np.array([next(values)]))
    with pytest.raises(ValueError, match="shapes differ"):
        bench.off(np.zeros(2), np.zeros(3))


def test_ratios_targets_and_files_side_by_side(bench, tmp_path, capsys):
    rows = [{**ROW, "part": "conv 3x3 s1", "row": name, "ratio": {"nchw": ratio}, "error": {"ours": {"y": error}}}
            for name, ratio, error in (("a", 0.4, 1e-5), ("b", 0.7, 3e-5))]
    told, = bench.verdicts(rows)
    assert (told["mean"], told["worst"], told["met"]) == (pytest.approx(0.28 ** 0.5), 0.7, True) and told["error"] == {"ours": {"y": 3e-5}}
    rows[1]["ratio"]["nchw"] = 0.95                                     # the worst and the mean of 0.62 both miss
    assert bench.verdicts(rows)[0]["met"] is False
    rows[0]["ratio"]["nchw"] = rows[1]["ratio"]["nchw"] = 0.7           # each within 0.75, the mean above 0.60
    assert bench.verdicts(rows)[0]["met"] is False
    for name, part in (("one.json", rows), ("two.json", rows[:1])):
        (tmp_path / name).write_text(json.dumps({"settings": {}, "date": "", "rows": part}))
    bench.show([tmp_path / "one.json", tmp_path / "two.json"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[-2:] == ["one", "two"] and [s.split() for s in lines[1:3]] == [["a", "nchw", "0.700", "0.700"], ["b", "nchw", "0.700"]]
    assert sum("MISSED" in s for s in lines) == 2


def test_a_row_is_medians_and_their_ratios(bench):
    order = []

    def side(name, seconds):
        def run():
            order.append(name)
            time.sleep(seconds)
        return run
    row = bench.measured("part", "name", lambda: ({"ours": side("ours", 0.01), "numpy": side("numpy", 0.02)}, {"flops": 1e9}), 3, 100.0)
    assert order == ["ours", "numpy", *["numpy"] * 2, *["ours"] * 4, *["numpy"] * 4, *["ours"] * 2]      # each goes first in its turn,
    order.clear()                                                       # and, where it is short, runs once untimed before
    bench.measured("part", "name", lambda: ({"ours": side("ours", 0.06), "numpy": side("numpy", 0.07)}, {}), 1, 1.0)
    assert order == ["ours", "numpy", "numpy", "ours"]
    assert row["ratio"]["numpy"] == row["ms"]["ours"] / row["ms"]["numpy"] < 1 and len(row["quartiles"]["numpy"]) == 2
    assert row["GFLOP/s"] == pytest.approx(1e3 / row["ms"]["ours"]) and row["of sgemm"] == pytest.approx(row["GFLOP/s"] / 100)


def test_ops_and_a_net_beside_pytorch(tmp_path):
    pytest.importorskip("torch")
    run("--quick", "--turns", 1, "--threads", 1, "--json", "a.json", "--only", "ops", "step", "--match", "ma", cwd=tmp_path)
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert {r["group"] for r in rows} == {"ops", "step"} and all("nchw" in r["ratio"] for r in rows)
    assert all("channels_last" in r["ratio"] for r in rows if "softmax" not in r["row"])
