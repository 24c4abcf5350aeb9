"""The GPU benchmark without a GPU: its checks see a wrong kernel, its peers compute the same, its dry run ends."""
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose

import fake_cupy
from tinydet import emulate, use

FILE = Path(__file__).resolve().parent.parent / "examples" / "bench_gpu.py"
spec = importlib.util.spec_from_file_location("bench_gpu", FILE)
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)
JOBS = bench.jobs()

needs_emulator = pytest.mark.skipif(emulate.missing() is not None, reason=str(emulate.missing()))


@needs_emulator
def test_a_dry_run_checks_and_times_every_job(tmp_path, capsys):
    path = tmp_path / "gpu.json"
    assert bench.main(bench.arguments(["--dry-run", "--json", str(path)])) == 0
    report = json.loads(path.read_text())
    assert report["dry_run"] and report["limits"] == {} and [row["name"] for row in report["rows"]] == [job.name for job in JOBS]
    for row, job in zip(report["rows"], JOBS):
        assert row["ms"] > 0 and row["error"] <= (0 if job.exact else job.tolerance) and "share" not in row and row["peers"] == {}
    out = capsys.readouterr().out
    assert "none wrong; a dry run: these times say nothing about a GPU" in out and "no GPU" in out and "/s" not in out.replace("--", "")


@needs_emulator
@pytest.mark.parametrize("group", ["conv", "pool", "nms", "sort", "loss", "sgd"])
def test_the_check_of_a_real_run_on_the_stand_in(group):
    """As on a GPU: convolution against unrolling in float64, the rest against the CPU."""
    job = next(j for j in JOBS if j.group == group)
    with fake_cupy.installed(), use("cuda") as put:
        assert bench.check(job, job.make(np.random.default_rng(0), 0.02), put, False) <= job.tolerance
    assert group != "conv" or {"conv_forward", "conv_im2col_unroll"} <= set(fake_cupy.launches)


@needs_emulator
def test_a_wrong_kernel_is_named_and_not_timed(tmp_path, capsys, monkeypatch):
    right, exact = (next(job for job in JOBS if job.exact == e and job.group == "pool") for e in (False, True))
    wrong = bench.dataclasses.replace(right, name="wrong", prepare=bench.simply(lambda x: x + (type(x) is np.ndarray) * x.dtype.type(x.dtype == np.float32)))
    last_bit = bench.dataclasses.replace(exact, name="last bit", prepare=bench.simply(lambda x: np.nextafter(x, x.dtype.type(9)) if use_count.pop() else x))
    use_count = [False, True]
    monkeypatch.setattr(bench, "jobs", lambda: [wrong, last_bit, right])
    assert bench.main(bench.arguments(["--dry-run", "--only", "pool", "--json", str(tmp_path / "gpu.json")])) == 1
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert ["failed" in row for row in rows] == [True, True, False] and "ms" not in rows[0]
    assert "relative error" in rows[0]["failed"] and "must be at most 0" in rows[1]["failed"]
    assert "2 wrong" in capsys.readouterr().out


@pytest.mark.parametrize("job", [j for j in JOBS if "torch" in j.peers and j.group in ("conv", "pool", "norm", "loss", "sgd")], ids=lambda j: j.name)
def test_the_peer_computes_the_same(job):
    """On the CPU, at small size: the layouts and options that PyTorch is given are right."""
    torch = pytest.importorskip("torch")
    inputs = job.make(np.random.default_rng(0), 0.01)
    with use("numpy"):
        ours = job.prepare(*(a.copy() for a in inputs))()
    try:
        theirs = job.peers["torch"](torch, [torch.from_numpy(a.copy()) for a in inputs])()
    except RuntimeError as error:
        pytest.skip(str(error))                                         # fused SGD and the like, on a GPU only
    if job.group in ("loss", "sgd"):
        return                                                          # no value comes back
    theirs = next(t for t in theirs if t is not None) if isinstance(theirs, tuple) else theirs
    theirs = theirs.numpy().transpose(2, 3, 1, 0) if job.name.endswith("dw") else theirs.numpy().transpose(0, 2, 3, 1)
    assert theirs.shape == ours.shape
    assert_allclose(theirs, ours, rtol=1e-3, atol=2e-5 * max(1, abs(ours).max()))


def test_sizes_and_wrong_arguments(capsys):
    x, w, b, dy = next(j for j in JOBS if "conv5_1" in j.name).make(np.random.default_rng(0), 1)
    assert x.shape == dy.shape == (32, 14, 14, 512) and w.shape == (3, 3, 512, 512) and b.shape == (512,)
    assert len({job.name for job in JOBS}) == len(JOBS)
    for arguments, message in ((["--turns", "0"], "must be at least 1"), (["--json", "no folder/x.json"], "must exist"), (["--only", "x"], "invalid choice")):
        with pytest.raises(SystemExit) as stop:
            bench.arguments(arguments)
        assert stop.value.code == 2 and message in capsys.readouterr().err
