"""examples/overfeat_classify.py, called in this process on a handful of canvases."""
import json
import math

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from PIL import Image

from tinydet import optim, scenes, use
from tinydet.evaluate_classification import top_k_error
from tinydet.models import overfeat
from tinydet.ops import softmax_loss

from test_device import example

program = example("overfeat_classify")
TINY = ["--canvases", "12", "--eval-canvases", "3", "--steps", "3", "--batch", "4", "--workers", "0"]
OWN = ["--width", "0.5", "--init", "0.03", "--dropout", "0.3", "--short", "64", "--lr", "0.03", "--momentum", "0.7", "--weight-decay", "0.1",
       "--decay-at", "2", "--seed", "4", "--measure-every", "1", "--checkpoint-every", "2"]
SCALES = {"1": [0], "4": [0, 1, 3, 5], "6": range(6)}


def run(out, *more, name="a"):
    args = program.arguments([*TINY, *map(str, more), "--out", str(out), "--name", name])
    with use(args.backend) as put:
        return program.main(args, put)


def read(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    run(out, *OWN)
    return out / "a"


@pytest.fixture(scope="module")
def data():
    return program.common.read_labelled(program.arguments(TINY))


def test_a_run_leaves_everything_in_its_folder(trained, data):
    variants = {"ten-views", "1-coarse", "1-fine", "4-coarse", "4-fine", "6-coarse", "6-fine-logits"}
    assert {p.name for p in trained.iterdir()} == {
        "config.json", "metrics.jsonl", "checkpoint.npz", "weights.npz", "results.json", "wrong.json", "curve.json", "loss.png", "curve.png", "maps.png",
        "filters.png", *(f"wrong_{name}.json" for name in variants)}
    results = read(trained / "results.json")
    assert results["set"] == "val" and results["images"] == 3 and results["seconds"] >= 0 and set(results["also"]) == variants
    assert results["curve"] == read(trained / "curve.json") and [p["step"] for p in results["curve"]] == [1, 2, 3]
    for name in variants | {None}:
        told, wrong = results["also"][name] if name else results, read(trained / (f"wrong_{name}.json" if name else "wrong.json"))
        assert set(wrong) == {"top1_error", "top5_error"}
        for error, of in wrong.items():
            assert len(of) == 3 and set(of) <= {0, 1} and told[error] == pytest.approx(np.mean(of), abs=1e-12)
    for name, least in (("maps", 400), ("filters", 200), ("loss", 300), ("curve", 200)):
        with Image.open(trained / f"{name}.png") as picture:
            assert min(picture.size) >= least


def test_a_run_trains_by_its_settings(trained, data):
    """The program's losses and weights are those of its parts put together here."""
    examples, _, classes = data
    net = overfeat.OverFeat(overfeat.Spec(classes, "small", 0.5, dropout=0.3, init=0.03), np.random.default_rng(4))
    optimizer, losses = optim.SGD(net, 0.7, 0.1), []
    with use("numba"):
        for i, lr in enumerate((0.03, 0.03, 0.015)):
            rng = np.random.default_rng([4, i])
            batch = rng.choice(12, 4, replace=False)
            views = np.stack([overfeat.training_view(net.table, examples[j].image(), rng, 64) for j in batch])
            scores, _, cache = net.forward(net.normalise(views), True, rng)
            value, d = softmax_loss.loss(scores[:, 0, 0], np.array([examples[j].labels[0] for j in batch]))
            net.backward(d[:, None, None], None, cache)
            optimizer.step(lr)
            losses.append(value)
    assert [json.loads(line)["loss"] for line in (trained / "metrics.jsonl").read_text().splitlines()] == losses
    loaded, settings = overfeat.load(trained / "weights.npz")
    assert settings == {"short": 64} and loaded.spec == net.spec
    for name, a in net.arrays().items():
        assert_array_equal(loaded.arrays()[name], a, strict=True, err_msg=name)


def test_variants_are_what_classify_answers(trained, data):
    net, (_, held_out, _) = overfeat.load(trained / "weights.npz")[0], data
    true, sizes = np.array([e.labels[0] for e in held_out]), net.table.sizes
    wanted = {"": {}, "_ten-views": None, "_6-fine-logits": {"probabilities": False}}
    wanted |= {f"_{n}-{stride}": {"sizes": [sizes[s] for s in scales], "fine": stride == "fine"}
               for n, scales in SCALES.items() for stride in ("coarse", "fine") if (n, stride) != ("6", "fine")}
    with use("numba"):
        found = [program.answers(net, e.image(), 64) for e in held_out]
        for name, how in wanted.items():
            said = np.array([overfeat.classify_ten(net, e.image(), 64) if how is None else overfeat.classify(net, e.image(), **how) for e in held_out])
            np.testing.assert_allclose([f[name[1:] or "6-fine"] for f in found], said, rtol=1e-6)
            wrong = read(trained / f"wrong{name}.json")
            for error, k in (("top1_error", 1), ("top5_error", 5)):
                assert wrong[error] == top_k_error(said, true, k).wrong.tolist()
        seen = [overfeat.classify(net, e.image(), sizes[:1], flip=False) for e in held_out]
    assert read(trained / "curve.json")[-1]["top1_error"] == top_k_error(np.array(seen), true, 1).error


def test_a_stopped_run_goes_on_to_the_same_bits_and_joins_a_committee(trained, data, tmp_path, monkeypatch):
    """Stopped in the third step, after the checkpoint of the second; and without keeping a training image in memory."""
    calls, loss = [], softmax_loss.loss

    def third_fails(*a):
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return loss(*a)
    monkeypatch.setattr(program.common, "KEPT", 0)
    monkeypatch.setattr(softmax_loss, "loss", third_fails)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, *OWN)
    assert (tmp_path / "a" / "checkpoint.npz").exists() and not (tmp_path / "a" / "weights.npz").exists()
    classes, member = data[2], tmp_path / "member.npz"
    other = overfeat.OverFeat(overfeat.Spec(classes, "small", 0.3, init=None), np.random.default_rng(9))
    overfeat.save(other, member, {})
    results = run(tmp_path, *OWN, "--resume", "--committee", member)
    assert len(calls) == 4
    nets = [overfeat.load(folder / "weights.npz")[0] for folder in (trained, tmp_path / "a")]
    for name, a in nets[0].arrays().items():
        assert_array_equal(nets[1].arrays()[name], a, strict=True, err_msg=name)
    for name in ("metrics.jsonl", "curve.json", "wrong.json", "wrong_4-fine.json"):
        assert (tmp_path / "a" / name).read_text() == (trained / name).read_text()
    with use("numba"):
        said = np.array([overfeat.committee([nets[0], other], e.image()) for e in data[1]])
        found = program.evaluate(nets[0], data[1], 64, [other])["committee"]
    np.testing.assert_allclose(found, said, rtol=1e-6)
    wrong = top_k_error(said, np.array([e.labels[0] for e in data[1]]), 1)
    assert read(tmp_path / "a" / "wrong_committee.json")["top1_error"] == wrong.wrong.tolist()
    assert results["also"]["committee"]["top1_error"] == wrong.error and results["seconds"] is None


def test_the_paper_s_settings():
    args = program.arguments(["--preset", "paper"])
    assert (args.table, args.width, args.init, args.dropout, args.short, args.batch) == ("accurate", 1.0, 0.01, 0.5, 256, 128)
    assert (args.lr, args.momentum, args.weight_decay, args.steps, args.decay_at) == (0.05, 0.6, 1e-5, None, None)
    program.settle(args, 1281167)
    epoch = math.ceil(1281167 * 10 / 128)                           # 100,092 steps
    assert args.steps == 90 * epoch and args.decay_at == [30 * epoch, 50 * epoch, 60 * epoch, 70 * epoch, 80 * epoch]
    rate = optim.step_schedule(args.lr, args.decay_at, 0.5)
    assert [rate(e * epoch) for e in (0, 29, 30, 49, 50, 59, 60, 69, 70, 79, 80, 89)] == [
        0.05, 0.05, 0.025, 0.025, 0.0125, 0.0125, 0.00625, 0.00625, 0.003125, 0.003125, 0.0015625, 0.0015625]
    args = program.arguments(["--preset", "paper", "--table", "small", "--init", "0", "--steps", "9", "--short", "70"])
    program.settle(args, 12)
    assert (args.table, args.init, args.short, args.steps, args.decay_at) == ("small", 0, 70, 9, [3, 5, 6, 7, 8])


@pytest.mark.parametrize("table, short, init, dropout", [("small", 70, 0, 0), ("fast", 268, 0.01, 0.5), ("accurate", 256, 0.01, 0.5)])
def test_what_follows_from_the_table(table, short, init, dropout):
    args = program.arguments(["--table", table])
    assert (args.short, args.init, args.dropout) == (short, init, dropout)
    program.settle(args, 7)
    assert (args.steps, args.decay_at, args.measure_every) == (2000, [], 400)


def test_images_smaller_than_any_window(tmp_path):
    """A portrait of 9 x 14 pixels: resizing brings every image to the net's sizes. Of two classes; maps and errors as ever."""
    for split, count in (("train", 3), ("val", 2)):
        for k, name in enumerate(("dark", "light")):
            folder = tmp_path / "set" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(np.full((14, 9, 3), 200 * k + i, np.uint8)).save(folder / f"{name}{i}.png")
    results = run(tmp_path, "--data", tmp_path / "set", "--width", "0.3", "--steps", "1")
    assert results["images"] == 4 and results["top5_error"] == 0 and [p["step"] for p in results["curve"]] == [1]


def voc_lists(folder):
    """A VOC folder whose lists are empty."""
    (folder / "ImageSets/Main").mkdir(parents=True)
    for name in ("Annotations", "JPEGImages"):
        (folder / name).mkdir()
    for split in ("train", "val"):
        (folder / "ImageSets/Main" / f"{split}.txt").write_text("\n")
    return folder


def test_what_cannot_be_is_said_before_a_run_begins(tmp_path, capsys):
    for wrong, message in ((["--short", "59"], "--short must be at least the window of the small net, 60 pixels, got 59"),
                           (["--table", "accurate", "--short", "220"], "of the accurate net, 221 pixels, got 220"),
                           (["--steps", "0"], "whole number of at least 1"), (["--lr", "0"], "--lr must be positive")):
        with pytest.raises(SystemExit):
            program.arguments(wrong)
        assert message in capsys.readouterr().err
    other = overfeat.OverFeat(overfeat.Spec(("a", "b"), "small", 0.1), np.random.default_rng(0))
    overfeat.save(other, tmp_path / "other.npz", {})
    detector = overfeat.OverFeat(overfeat.Spec(scenes.CLASSES, "small", 0.1, background=True), np.random.default_rng(0))
    overfeat.save(detector, tmp_path / "detector.npz", {})
    for wrong, error, message in (
            (["--data", tmp_path / "nowhere"], FileNotFoundError, "nowhere"),
            (["--data", voc_lists(tmp_path / "voc")], ValueError, "got none"),
            (["--decay-at", "1", "3"], ValueError, "--decay-at must lie below --steps 3, got 3"),
            (["--committee", tmp_path / "other.npz"], ValueError, r"--committee: .*other.npz must be a classifier of cross, .*, got a, b$"),
            (["--committee", tmp_path / "detector.npz"], ValueError, r"detector.npz must be a classifier of .*, got .*, as a detector$"),
            (["--momentum", "1"], ValueError, "momentum must lie in"), (["--width", "0"], ValueError, "width must be above 0"),
            (["--dropout", "1"], ValueError, "dropout must lie in"), (["--init", "-1"], ValueError, "init must be None, or above 0")):
        with pytest.raises(error, match=message):
            run(tmp_path / "out", *wrong)
    assert not (tmp_path / "out").exists()
