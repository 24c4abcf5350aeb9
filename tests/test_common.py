"""What the training programs share (examples/common.py): labelled examples, what a run took, and the net that it starts from."""
import argparse
import gzip
import json
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tinydet import scenes, train

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
import common  # noqa: E402


def write_idx(folder, split, count, first=0):
    """IDX files of 8 x 8 images, each of one grey value, which says which it is; labels i % 3."""
    folder.mkdir(exist_ok=True)
    values = np.arange(first, first + count)
    pixels = np.repeat(values, 64).astype(np.uint8)
    for kind, head, body in (("images-idx3", struct.pack(">IIII", 0x803, count, 8, 8), pixels),
                             ("labels-idx1", struct.pack(">II", 0x801, count), (values % 3).astype(np.uint8))):
        (folder / f"{split}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + body.tobytes()))


def read(folder, eval_set="val"):
    return common.read_labelled(SimpleNamespace(data=folder, train_set="train", eval_set=eval_set, canvases=40, eval_canvases=30))


def items_of(monkeypatch, folder, eval_set):
    """The grey values of the items that the canvases of both sets are made from."""
    seen = []
    monkeypatch.setattr(common.canvases, "canvases", lambda examples, *_, **__: seen.append({int(e.source[0, 0]) for e in examples}))
    read(folder, eval_set)
    return seen


def test_validation_canvases_hold_items_that_no_training_canvas_holds(tmp_path, monkeypatch):
    write_idx(tmp_path / "set", "train", 60, 30)
    write_idx(tmp_path / "set", "t10k", 12, 100)
    train, val = items_of(monkeypatch, tmp_path / "set", "val")
    assert len(val) == 10 and len(train) == 50 and not train & val and train | val == set(range(30, 90))
    assert items_of(monkeypatch, tmp_path / "set", "val") == [train, val]                   # the same for every seed of a run
    train, test = items_of(monkeypatch, tmp_path / "set", "test")
    assert train == set(range(30, 90)) and test == set(range(100, 112))                     # the test set leaves all to train on
    write_idx(tmp_path / "set", "val", 5, 200)
    train, val = items_of(monkeypatch, tmp_path / "set", "val")
    assert train == set(range(30, 90)) and val == set(range(200, 205))


def test_canvases_of_items_and_of_shapes(tmp_path):
    write_idx(tmp_path / "set", "train", 60, 100)
    for folder, classes in ((tmp_path / "set", tuple("0123456789")), (None, scenes.CLASSES)):
        examples, held_out, names = read(folder)
        assert tuple(names) == classes and (len(examples), len(held_out)) == (40, 30)
        assert all(e.size == (116, 96) and len(e.labels) == 1 for e in examples + held_out)
        again = read(folder)
        assert (examples[3].image() == again[0][3].image()).all() and (examples[3].image() != held_out[3].image()).any()


def test_images_of_several_classes_are_left_out_and_told(tmp_path, capsys, monkeypatch):
    made = scenes.scenes(8, 0)
    one = [e for e in made if len(set(e.labels.tolist())) == 1]
    monkeypatch.setattr(common, "read", lambda args: (made, one, scenes.CLASSES))
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (9, 9)).save(tmp_path / split / name / "x.png")
    examples, held_out, _ = read(tmp_path)
    assert [e.name for e in examples] == [e.name for e in one] == [e.name for e in held_out] and 0 < len(one) < 8
    assert capsys.readouterr().out == f"train: {8 - len(one)} of 8 images are left out, for they are not of one class\n"
    monkeypatch.setattr(common, "read", lambda args: (one, [e for e in made if e not in one], scenes.CLASSES))
    with pytest.raises(ValueError, match=r"^read_labelled: .* must hold images of one class in val, got none$"):
        read(tmp_path)


# What a run leaves, and what it starts from

def test_results_say_what_training_took(tmp_path):
    for seconds, resume, told in ((12.3456, False, 12.346), (12.3456, True, None), (None, False, None)):
        run = train.Run(tmp_path / f"{seconds} {resume}", {})
        run.seconds = seconds
        found = common.keep_results(run, SimpleNamespace(eval_set="test", resume=resume), {"AP": 0.5})
        assert found == json.loads((run.folder / "results.json").read_text())
        assert 10 < found.pop("memory_MB") < 1e6 and found == {"set": "test", "AP": 0.5, "training_seconds": told}


class Program:
    """Stands in for a program that trains a source net; notes its arguments."""

    def __init__(self):
        self.trained = []

    def arguments(self, argv):
        parser = argparse.ArgumentParser()
        common.add_arguments(parser, "source")
        parser.add_argument("--proposals")
        return parser.parse_args(argv)

    def main(self, args, put):
        self.trained.append((args.name, args.seed, args.resume, put))
        folder = Path(args.out) / args.name
        train.Run(folder, common.settings(args), args.resume)
        (folder / "weights.npz").touch()


def test_a_source_net_is_taken_if_it_saw_the_same_data(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    program, given = Program(), ["--data", "cells", "--train-set", "a", "--eval-set", "b", "--proposals", "p.json"]
    args = SimpleNamespace(out=str(tmp_path), name="map", resume=False, backend="numba", seed=3)

    def trained(*options, name="source"):
        return common.trained(args, "put", program, name, *options)
    assert trained(*given) == tmp_path / "source" / "weights.npz" and capsys.readouterr().out.startswith("first the source net, into ")
    assert trained("--scenes", "9", name="scenes") == tmp_path / "scenes" / "weights.npz" and len(program.trained) == 2
    args.seed = 4
    capsys.readouterr()
    same = ["--data", str(tmp_path / "cells"), *given[2:]]              # the same folder
    for options, name in ((given, "source"), (same, "source"), ([], "source"), (["--scenes", "9"], "scenes"), ([], "scenes")):
        assert trained(*options, name=name) == tmp_path / name / "weights.npz"
        assert capsys.readouterr().out == f"starts from {tmp_path / name}, of seed 3\n"
    there = rf"^{tmp_path}/source must be a run with "
    for options, message in (
            (["--data", "others", *given[2:]], f"data {tmp_path}/others, for that is asked for here, got one with {tmp_path}/cells: move it away"),
            (["--data", "cells", "--train-set", "c"], "train_set c, .* got one with a:"),
            ([*given[:4], "--eval-set", "c"], "eval_set c, .* got one with b:"),
            ([*given[:6], "--proposals", "q.json"], "proposals q.json, .* got one with p.json:"),
            (["--scenes", "9"], "scenes 9, .* got one with 400:")):
        with pytest.raises(ValueError, match=there + message):
            trained(*options)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/scenes must be a run with scenes 10, .* got one with 9"):
        trained("--scenes", "10", name="scenes")
    with pytest.raises(ValueError, match=rf"^{tmp_path}/scenes must be a run with data {tmp_path}/cells, .* got one with None"):
        trained("--data", "cells", name="scenes")
    assert program.trained == [("source", 3, False, "put"), ("scenes", 3, False, "put")]


def test_a_source_net_that_was_stopped_goes_on_if_it_saw_the_same_data(tmp_path):
    program, args = Program(), SimpleNamespace(out=str(tmp_path), name="map", resume=True, backend="numba", seed=3)
    common.trained(args, "put", program, "source", "--scenes", "9")
    (tmp_path / "source" / "weights.npz").unlink()
    with pytest.raises(ValueError, match="must be a run with scenes 8, .* got one with 9"):
        common.trained(args, "put", program, "source", "--scenes", "8")
    assert common.trained(args, "put", program, "source", "--scenes", "9").is_file()
    assert program.trained == [("source", 3, False, "put"), ("source", 3, True, "put")]
