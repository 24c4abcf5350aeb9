"""examples/bench_ohem.py on a few regions of small images: both forms agree, and what is told follows from what was measured."""
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from tinydet import scenes, to_numpy, use
from tinydet.models import fast_rcnn

FILE = Path(__file__).resolve().parent.parent / "examples" / "bench_ohem.py"
sys.path.insert(0, str(FILE.parent))
bench, timing = map(importlib.import_module, ("bench_ohem", "timing"))
bench.SCENES = 5
SMALL = ["--regions", "40", "--short", "64", "--turns", "2"]


@pytest.fixture(scope="module")
def made():
    """A Bench of small images and a pair of them."""
    with use("numba") as put:
        b = bench.Bench(bench.arguments(SMALL), put)
        return b, *b.pair(0)


def test_a_run_tells_and_writes_all(tmp_path, capsys, probes):
    asked, path = probes(FILE), tmp_path / "a.json"
    args = bench.arguments([*SMALL, "--seed", "3", "--json", str(path)])
    with use("numba") as put:
        result = bench.main(args, put)
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    assert set(result) == {"settings", "date", "agreement", "regions that train", "turns", "time", "memory", "paper: s a step, GB"}
    assert [a["form"] for a in asked] == list(bench.FORMS) and all(a["seed"] == 3 and a["short"] == 64 for a in asked)
    assert {k: result["settings"][k] for k in ("regions", "short", "turns", "seed", "table", "backend", "images", "batch")} == {
        "regions": 40, "short": 64, "turns": 2, "seed": 3, "table": "small", "backend": "numba", "images": 2, "batch": 128}
    assert all(len(result["turns"][k]) == 2 and min(result["turns"][k]) > 0 for k in bench.FORMS) and result["time"] == timing.told(result["turns"], bench.PAIRS)
    trained = result["regions that train"]
    assert 80 < trained["all"] <= 2 * (40 + 5) and 0 < trained["ohem"] == trained["zeroing"] < trained["all"] and 0 < trained["random"] < trained["all"]
    assert result["agreement"]["gradients apart"] < 1e-4 and result["memory"]["MB"]["zeroing"] == {"traced": 30.0, "resident": 5.0}
    out = capsys.readouterr().out
    assert "agree" in out and "not for quoting" in out and [s.split()[0] for s in out.splitlines() if s.startswith(bench.FORMS)] == [*bench.FORMS, "ohem"]
    row = next(s for s in out.splitlines() if s.startswith("ohem  ")).split()
    assert row[-4:] == ["1.00,", "1.75,", "8.7,", "1.36"]           # the paper's


def test_ratios_by_hand():
    told = timing.told({"random": [1.0, 2.0, 4.0], "ohem": [2.0, 6.0, 4.0], "zeroing": [8.0, 8.0, 16.0], "all": [1.0, 2.0, 4.0]}, bench.PAIRS)
    assert told["seconds"] == {"random": 2.0, "ohem": 4.0, "zeroing": 8.0, "all": 2.0}
    assert told["ratio"] == {"ohem / random": 2.0, "zeroing / random": 4.0, "all / random": 1.0, "ohem / zeroing": 0.5}
    assert told["quartiles"]["ohem / random"] == [1.5, 2.5] and told["quartiles"]["all / random"] == [1.0, 1.0]      # of 2, 3, 1
    assert told["quartiles"]["ohem / zeroing"] == [0.25, 0.5]       # of 0.25, 0.75, 0.25
    memory = bench.memory_told({k: {"traced": v} for k, v in {"random": 10.0, "ohem": 20.0, "zeroing": 30.0, "all": 50.0}.items()}, 10.0)
    assert memory["ratio"] == {k: {"traced": v} for k, v in {
        "ohem / random": 1.5, "zeroing / random": 2.0, "all / random": 3.0, "ohem / zeroing": 0.75}.items()}


def test_the_forms_take_turns_on_the_same_images(made, monkeypatch):
    order = []
    monkeypatch.setattr(made[0], "sides", {k: lambda x, regions, rng, k=k: order.append((k, x.sum(), len(regions[0].boxes))) or len(order)
                                           for k in bench.FORMS})
    times, counts = bench.measure(made[0])
    names = [o[0] for o in order]
    assert names[:4] == list(bench.FORMS) and [names[i] for i in (0, 4, 8)] == list(bench.FORMS[:3])
    assert all(len({o[1:] for o in order[i:i + 4]}) == 1 for i in (0, 4, 8)) and len({o[1] for o in order}) == 3
    assert all(len(t) == 2 for t in times.values()) and counts["random"] == (8 + 11) / 2        # the first turn does not count


def test_zeroing_has_the_gradient_of_two_networks_and_weights_stay(made):
    b, x, regions = made
    before = {k: w.copy() for k, w in b.net.params.items()}
    assert bench.agree(b.net, x, regions)["gradients apart"] < 1e-4 and not any(g.any() for g in b.net.grads.values())
    values, chosen = bench.zeroing(b.net, x, regions, fast_rcnn.Sampler(batch=20), np.random.default_rng(0))
    assert values["regions"] == sum(map(len, chosen)) <= 20
    assert any(g.any() for g in b.net.grads.values())
    for run in b.sides.values():
        run(x, regions, np.random.default_rng(0))
        assert not any(g.any() for g in b.net.grads.values())       # the optimiser ran
    for k, w in b.net.params.items():
        np.testing.assert_array_equal(to_numpy(w), before[k], err_msg=k)


def scaled(net, x, regions, sampler, rng, chosen=None, zeroing=bench.zeroing):
    result = zeroing(net, x, regions, sampler, rng, chosen)
    g = net.grads["trunk.conv2.w"]
    g *= 1.001
    return result


def others(net, x, regions, sampler, rng, chosen=None, zeroing=bench.zeroing):
    return zeroing(net, x, regions, sampler, rng, chosen if chosen is not None else [np.arange(9)] * 2)


def one_more(net, x, regions, sampler, rng, chosen=None, zeroing=bench.zeroing):
    more = None if chosen is None else [np.append(chosen[0], np.setdiff1d(np.arange(40), chosen[0])[0]), chosen[1]]
    return zeroing(net, x, regions, sampler, rng, more)


@pytest.mark.parametrize("broken, message", [(scaled, "same gradients to 0.0001, got 0.001 for trunk.conv2.w"), (others, "must have the same loss"),
                                             (one_more, "same gradients")])
def test_forms_that_differ_are_not_timed(made, monkeypatch, broken, message):
    monkeypatch.setattr(bench, "zeroing", broken)
    with pytest.raises(ValueError, match=f"bench_ohem: both forms .*{message}"):
        bench.agree(made[0].net, *made[1:])


def test_memory_of_a_step(monkeypatch):
    args = bench.arguments([*SMALL, "--regions", "200"])
    with use("numba") as put:
        found = {form: bench.probe(form, args, put) for form in ("random", "zeroing")}
    kept = 2 * 200 * 25 * 64 * 4 / 2**20                            # the pooled regions, which zeroing keeps for backward
    assert found["zeroing"]["traced"] > found["random"]["traced"] + kept and found["zeroing"]["traced"] < 20 * kept
    assert all(f["resident"] >= 0 for f in found.values())


def test_windows_are_drawn_from_many_of_a_folder_too(monkeypatch):
    asked = []
    monkeypatch.setattr(bench.data, "read", lambda *a: asked.append(a) or (scenes.scenes(3, 7), ("a", "b", "c", "d", "e", "f")))
    with use("numba") as put:
        b = bench.Bench(bench.arguments(["--data", "somewhere", "--set", "val", *SMALL]), put)
    x, regions = b.pair(5)
    again, _ = b.pair(5)
    np.testing.assert_array_equal(x, again)
    assert asked == [("somewhere", "val")] and b.net.spec.classes == ("a", "b", "c", "d", "e", "f") and x.shape[0] == 2 and min(x.shape[1:3]) >= 64
    assert all(len(np.unique(r.boxes, axis=0)) == len(r.boxes) for r in regions)
    with pytest.raises(ValueError, match=r"--regions must be at most the windows of every image, \d+ on average, got 10000000"):
        bench.source(bench.arguments(["--data", "somewhere", "--regions", "10000000"]))
    monkeypatch.setattr(bench.data, "read", lambda *a: (scenes.scenes(1, 7), scenes.CLASSES))
    with pytest.raises(ValueError, match="there must be at least 2 images, got 1"):
        bench.source(bench.arguments(["--data", "somewhere"]))


@pytest.mark.parametrize("args, message", [
    (["--turns", "0"], "--turns must be at least 1, got 0"), (["--regions", "0"], "--regions must be at least 1"), (["--short", "8"], "--short must"),
    (["--seed", "-1"], "--seed must be at least 0"), (["--json", "none/a.json"], "folder of --json none/a.json must exist"), (["--table", "x"], "--table")])
def test_wrong_arguments_are_named_before_measuring(args, message, capsys):
    with pytest.raises(SystemExit):
        bench.arguments(args)
    assert message in capsys.readouterr().err
