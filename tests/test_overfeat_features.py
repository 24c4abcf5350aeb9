"""The release's command line: layers by its numbers, its formats, PPM streams, folders of images; on tiny nets for the real ones."""
import io
import math
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from conftest import BACKENDS
from test_examples import command, module
from test_overfeat_weights import BYTES, RELEASED, conv, pool
from tinydet import use
from tinydet.models import overfeat_weights
from tinydet.models.overfeat import TABLES, OverFeat, Spec, Table

program = module("overfeat_features")
REAL = dict(TABLES)
FAST = Table((("conv1", 4, 3, 2, 0, 2), ("conv2", 5, 3, 1, 1, 2)), 2, (("fc3", 6), ("fc4", 3)))                 # window 17, -f 10
ACCURATE = Table((("conv1", 3, 3, 2, 0, 1), ("conv2", 4, 3, 1, 1, 3)), 2, (("fc3", 5), ("fc4", 4)))              # window 13, -f 9


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(TABLES, "fast", FAST)
    monkeypatch.setitem(TABLES, "accurate", ACCURATE)


def write(folder, name, seed=1):
    """A file of the tiny net of that name, 1000 classes, and its arrays in order."""
    rng, arrays = np.random.default_rng(seed), []
    for _, shape in overfeat_weights.layout(TABLES[name])[0].values():
        drawn = rng.normal(0, math.sqrt(2 / math.prod(shape[1:])), shape) if len(shape) > 1 else rng.uniform(0.1, 0.3, shape)
        arrays.append(drawn.astype("<f4"))
    path = folder / f"net_weight_{name}"
    path.write_bytes(b"".join(a.tobytes() for a in arrays))
    return path, arrays


def picture(H, W, seed=2):
    return np.random.default_rng(seed).integers(0, 256, (H, W, 3), np.uint8)


def ppm(image, header=b"P6\n%d %d\n255\n"):
    return header % image.shape[1::-1] + image.tobytes()


def called(monkeypatch, *args, stdin=b""):
    """main(args) in this process."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    args = program.arguments(list(map(str, args)))
    with use(args.backend) as put:
        program.main(args, put)


# Layers

LISTED = {  # notes, 6.2
    "fast": "norm conv relu pool conv relu pool pad conv relu pad conv relu pad conv relu pool conv relu conv relu conv",
    "accurate": "norm conv relu pool conv relu pool pad conv relu pad conv relu pad conv relu pad conv relu pool conv relu conv "
                "relu conv"}


@pytest.mark.parametrize("name, features, window", [("fast", 19, 231), ("accurate", 22, 221)])
def test_layers_have_the_numbers_of_the_release(name, features, window):
    found = program.modules(REAL[name])
    assert " ".join(kind for kind, _ in found) == LISTED[name] and len(found) == {"fast": 22, "accurate": 25}[name]
    assert program.feature_layer(REAL[name]) == features
    assert found[features][1].Cout == 4096 and found[features + 1][0] == "relu"
    least = [program.Net(name, found[:k + 1], {}).least for k in range(len(found))]
    assert least[0] == 1 and least[-1] == least[features] == window
    first = {"fast": [11, 11, 15], "accurate": [7, 7, 11]}[name]                # conv1, relu, pool1: (pool - 1) * stride + size
    assert least[1:4] == first
    assert program.layer_names(REAL["fast"]).startswith("0:norm 1:conv1 2:relu 3:pool2 4:conv2 ")


def layers_by_definition(image, a):
    """What every layer of the tiny fast net makes, channels first, in loops."""
    def relu(x):
        return np.where(x > 1e-6, x, 0)
    ys = [(image.transpose(2, 0, 1).astype(float) - 118.380948) / 61.896913]
    for step in (lambda x: conv(x, a[0], a[1], stride=2), relu, lambda x: pool(x, 2),                           # 1 to 3
                 lambda x: np.pad(x, ((0, 0), (1, 1), (1, 1))), lambda x: conv(x, a[2], a[3]), relu, lambda x: pool(x, 2),
                 lambda x: conv(x, a[4], a[5]), relu, lambda x: conv(x, a[6], a[7]), relu, lambda x: conv(x, a[8], a[9])):
        ys.append(step(ys[-1]))
    return ys


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_layer_is_the_definition(tmp_path, backend):
    path, arrays = write(tmp_path, "fast")
    image = picture(26, 33)
    expected = layers_by_definition(image, arrays)
    with use(backend) as put:
        net = program.load(path, put=put)
        for k, y in enumerate(expected):
            found = program.features(net._replace(modules=net.modules[:k + 1]), image, put=put)
            assert found.dtype == np.float32
            assert_allclose(found, y, rtol=0, atol=2e-5, err_msg=str(k))
    assert len(expected) == len(net.modules) and expected[10].shape == (3, 2, 3) and expected[11].min() == 0 > expected[10].min()


@pytest.mark.parametrize("name, layer", [("fast", 10), ("accurate", 9)])
def test_minus_f_is_the_last_convolution_but_one_before_its_relu(tmp_path, name, layer):
    path, arrays = write(tmp_path, name)
    net, image = program.load(path, "features"), picture(20, 22)
    assert len(net.modules) == layer + 1 == program.feature_layer(TABLES[name]) + 1
    assert_array_equal(program.features(net, image), program.features(program.load(path, layer), image))
    whole = OverFeat(Spec(tuple(map(str, range(1000))), name), np.random.default_rng(0))
    overfeat_weights.load_published(whole, path)
    y = program.features(net, image)
    scores = np.einsum("chw,dc->hwd", np.maximum(y, 0), arrays[-2][:, :, 0, 0]) + arrays[-1]
    assert_allclose(scores, whole.forward(whole.normalise(image[None]))[0][0], rtol=0, atol=2e-5)


def test_the_relu_cuts_at_a_millionth(tmp_path):
    net = program.load(write(tmp_path, "fast")[0], 2)
    net.weights["trunk.conv1.w"][...] = 0
    net.weights["trunk.conv1.b"][...] = 9e-7, 1.1e-6, -1, 3
    assert_array_equal(program.features(net, picture(3, 3))[:, 0, 0], np.array([0, 1.1e-6, 0, 3], np.float32))


def test_arrays_of_later_layers_are_not_read(tmp_path):
    path, arrays = write(tmp_path, "fast")
    arrays[-1][-1] = np.nan
    path.write_bytes(b"".join(a.tobytes() for a in arrays))
    with pytest.raises(ValueError, match=r"net_weight_fast: classifier\.out\.b must be finite, got NaN or infinity$"):
        program.load(path)
    assert set(program.load(path, 7).weights) == {"trunk.conv1.w", "trunk.conv1.b", "trunk.conv2.w", "trunk.conv2.b"}
    assert program.load(path, 0).weights == {}


@pytest.mark.parametrize("layer, large, told", [
    (13, False, r"the layer must lie in 0\.\.12 for the fast net, got 13$"), (-1, False, r"0\.\.12 for the fast net, got -1$"),
    (None, True, r"with -l, .*net_weight_fast must be the accurate net's file, net_weight_1, got the size of the fast net's$")])
def test_what_load_refuses(tmp_path, layer, large, told):
    with pytest.raises(ValueError, match=told):
        program.load(write(tmp_path, "fast")[0], layer, large)


def test_an_image_must_hold_what_the_layer_needs(tmp_path):
    path, _ = write(tmp_path, "fast")
    for layer, least in ((None, 17), (0, 1), (1, 3), (3, 5), (4, 5), (5, 5), (7, 9), (8, 17)):        # by hand, from the last back
        net = program.load(path, layer)
        assert net.least == least
        assert program.features(net, picture(least, least)).shape[1:] == {0: (1, 1), 4: (3, 3)}.get(layer, (1, 1))
        if layer != 0:
            last = len(net.modules) - 1
            with pytest.raises(ValueError, match=rf"a\.jpg must have at least {least}x{least} pixels for layer {last} of the fast "
                               rf"net, got {least + 5}x{least - 1}$"):
                program.features(net, picture(least - 1, least + 5), "a.jpg")


# Classes

def test_what_is_classified_is_the_centre_of_the_image_at_the_fast_nets_window(monkeypatch):
    monkeypatch.setitem(TABLES, "fast", REAL["fast"])
    image = picture(231, 240)
    assert_array_equal(program.view(image), image[:, 4:235])                                            # (240 - 231) // 2 = 4
    assert_array_equal(program.view(image.transpose(1, 0, 2)), image.transpose(1, 0, 2)[4:235])
    image = np.zeros((462, 1000, 3), np.uint8)
    image[:, 269:731] = 200                                                                             # the centre square
    found = program.view(image)
    assert found.shape == (231, 231, 3) and (found[:, 1:-1] == 200).all()
    assert program.view(picture(40, 30)).shape == (231, 231, 3)


@pytest.mark.parametrize("name", ["fast", "accurate"])
def test_the_best_classes_are_printed_best_first(tmp_path, monkeypatch, capsys, name):
    path, _ = write(tmp_path, name)
    shots = [picture(17, 17), picture(21, 30, 3)]
    for k, image in enumerate(shots):
        Image.fromarray(image).save(tmp_path / f"{k}.png")
    (tmp_path / "names").write_text("".join(f"class {k}, the\n" for k in range(1000)))
    called(monkeypatch, "--weights", path, *["-l"] * (name == "accurate"), tmp_path / "0.png", tmp_path / "1.png", "-n", 3,
           "--names", tmp_path / "names")
    lines = capsys.readouterr().out.splitlines()
    whole = OverFeat(Spec(tuple(map(str, range(1000))), name), np.random.default_rng(0))
    overfeat_weights.load_published(whole, path)
    assert len(lines) == 6
    for found, image in ((lines[:3], shots[0]), (lines[3:], program.view(shots[1]))):
        scores = whole.forward(whole.normalise(image[None]))[0][0, 0, 0].astype(float)
        p = np.exp(scores) / np.exp(scores).sum()
        best = np.argsort(-p)[:3]
        assert [line.rsplit(" ", 1)[0] for line in found] == [f"class {k}, the" for k in best]
        assert_allclose([float(line.rsplit(" ", 1)[1]) for line in found], p[best], rtol=1e-4)


def test_answers_have_six_digits_and_ties_go_to_the_lower_class():
    assert program.answer(np.array([0.125, 0.25, 1e-7 / 3, 0.25]), ["a", "bee, the", "c", "d"], 4) == (
        "bee, the 0.25\nd 0.25\na 0.125\nc 3.33333e-08\n")
    assert program.answer(np.array([0.1, 0.9]), "ab", 1) == "b 0.9\n"


def test_names_are_a_line_for_each_class(tmp_path):
    assert program.class_names(None)[:2] == ["0", "1"] and len(program.class_names(None)) == 1000
    for content, told in ((b"a\n" * 999, "names must have 1000 lines, got 999$"), (b"\xff\n" * 1000, "names must be UTF-8, got: ")):
        (tmp_path / "names").write_bytes(content)
        with pytest.raises(ValueError, match=told):
            program.class_names(tmp_path / "names")


# The features' text

def test_features_as_text():
    a = np.array([[[0, -1.5, 1e-7]], [[1234567, 0.1, 1 / 3]]], np.float32)
    assert program.feature_text(a) == "2 1 3\n0 -1.5 1e-07 1.23457e+06 0.1 0.333333 \n"


NUMBERS = st.floats(-2.0**100, 2.0**100, width=32, allow_subnormal=False)


@given(st.lists(hnp.arrays(np.float32, hnp.array_shapes(min_dims=3, max_dims=3, max_side=4), elements=NUMBERS), max_size=3))
def test_what_is_written_reads_back(tmp_path_factory, arrays):
    path = tmp_path_factory.getbasetemp() / "some.features"
    text = "".join(map(program.feature_text, arrays))
    path.write_text(text)
    found = program.read_features(path)
    assert len(found) == len(arrays) and "".join(map(program.feature_text, found)) == text
    for a, b in zip(found, arrays):
        assert_allclose(a, b, rtol=5.1e-6, strict=True)


@pytest.mark.parametrize("text, told", [
    (b"1 1 2\n1 2 ", r"a\.features must consist of pairs of whole lines"), (b"1 1 2\n", "pairs of whole lines, got 1 "),
    (b"1 2\n1 2 \n", r"line 1 must be three counts, n h w, got b'1 2'$"), (b"0 1 1\n \n", "three counts"),
    (b"-1 1 1\n1 \n", "three counts"),
    (b"1 1 2\n1 2 \n1 1 2\n1 2 3 \n", r"a\.features: line 4 must have 1 \* 1 \* 2 numbers, got 3$"),
    (b"1 1 2\n1 x \n", r"line 2 must be numbers, got: .*x"), (b"\xff\xfe 1 1\n1 \n", "three counts"),
    (b"99999999 99999999 99999999\n1 \n", "must have 99999999 .* numbers, got 1$")])
def test_text_that_is_refused(tmp_path, text, told):
    (tmp_path / "a.features").write_bytes(text)
    with pytest.raises(ValueError, match=told):
        program.read_features(tmp_path / "a.features")


# PPM

def test_a_stream_of_pictures():
    shots = [picture(2, 3), picture(1, 1, 3), picture(4, 2, 4)]
    shots[1][...] = ord("\n")                                                # pixels that look like white space
    headers = b"P6\n%d %d\n255\n", b"P6 # one\n#two 7 8\n %d\t# three\r\n%d 255\r", b"P6\n%d# no space\n%d\n255 "
    found = list(program.pictures(io.BytesIO(b"".join(map(ppm, shots, headers)))))
    assert len(found) == 3 and list(program.pictures(io.BytesIO(b""))) == []
    for a, b in zip(found, shots):
        assert_array_equal(a, b, strict=True)
    with Image.open(io.BytesIO(ppm(shots[0], headers[0]))) as image:
        assert_array_equal(found[0], np.asarray(image))


@pytest.mark.parametrize("content, told", [
    (b"P5\n1 1\n255\n123", r"picture 2 of standard input must begin with P6 and white space, got b'P5'$"),
    (b"P", "begin with P6"),
    (b"\n" + ppm(picture(1, 1)), "begin with P6"), (b"P64 1 255\n", "begin with P6"), (b"P6", "begin with P6"),
    (b"P6\n-1 1\n255\n123", r"must have a width in its header, got b'-'$"), (b"P6\n1 x\n255\n123", "have a height in"),
    (b"P6\n1 1\n# only", r"must have a largest value in its header, got b'', and the end$"),
    (b"P6\n1 1\n25", r"got b'25', and the end$"),
    (b"P6\n12345678901 1\n255\n123", r"have a width in its header, got b'12345678901'$"),
    (b"P6\n1 1\n65535\n123456", r"values up to 255 .* got values up to 65535, 1x1 pixels$"),
    (b"P6\n0 1\n255\n", r"1 to 100000000 pixels, .*, 0x1 pixels$"), (b"P6\n30001 1\n255\n", "pixels, 30000 a side"),
    (b"P6\n20000 20000\n255\n", "20000x20000 pixels$"), (b"P6\n1 2\n255\n12345", r"must have 6 bytes of pixels, got 5$")])
def test_streams_that_are_refused(content, told):
    stream = program.pictures(io.BytesIO(ppm(picture(2, 2)) + content))
    assert next(stream).shape == (2, 2, 3)
    with pytest.raises(ValueError, match=told):
        next(stream)


# The program

@pytest.mark.parametrize("args, told", [
    ([], "give --weights FILE, net_weight_0 or net_weight_1 of OverFeat's release; and at least one image, or -p for .*batch"),
    (["--weights", "w"], "error: give at least one image, or -p"), (["a.jpg"], "error: give --weights FILE.*release$"),
    (["--weights", "w", "-p", "a.jpg"], "images, -p and --batch exclude each other$"),
    (["--weights", "w", "--batch", "a", "b", "-p"], "exclude each other$"),
    (["--weights", "w", "-n", "0", "a.jpg"], "-n: must be a whole")])
def test_the_program_says_what_is_missing(capsys, args, told):
    with pytest.raises(SystemExit):
        program.arguments(args)
    assert re.search(told, capsys.readouterr().err.splitlines()[-1])


def test_the_help_lists_the_layers_of_the_released_nets_only(capsys):
    with pytest.raises(SystemExit):
        program.arguments(["-h"])
    assert re.findall(r"^(\w+), -f (\d+): 0:norm", capsys.readouterr().out, re.M) == [("fast", "10"), ("accurate", "9")]


def test_features_of_several_images_and_of_a_stream_are_the_same_text(tmp_path, monkeypatch, capsys):
    path, _ = write(tmp_path, "accurate")
    shots = [picture(13, 13), picture(19, 26, 3)]
    for k, image in enumerate(shots):
        Image.fromarray(image).save(tmp_path / f"{k}.png")
    called(monkeypatch, "--weights", path, "-f", tmp_path / "0.png", tmp_path / "1.png")
    text = capsys.readouterr().out
    (tmp_path / "features").write_text(text)
    found, net = program.read_features(tmp_path / "features"), program.load(path, 9)
    assert [a.shape for a in found] == [(4, 1, 1), (4, 2, 3)]
    for a, image in zip(found, shots):
        assert_allclose(a, program.features(net, image), rtol=1e-5)
    called(monkeypatch, "--weights", path, "-fp", stdin=b"".join(map(ppm, shots)))
    assert capsys.readouterr().out == text
    called(monkeypatch, "--weights", path, "-f", "-L", 0, "-p", stdin=ppm(shots[0]))                     # -L overrides -f
    assert capsys.readouterr().out.startswith("3 13 13\n")
    with pytest.raises(ValueError, match="^overfeat_features.features: picture 2 must have at least 13x13 pixels"):
        called(monkeypatch, "--weights", path, "-fp", stdin=ppm(shots[0]) + ppm(shots[1][:12]))


def test_a_folder_of_images(tmp_path, monkeypatch, capsys):
    path, _ = write(tmp_path, "fast")
    folder, out = tmp_path / "in", tmp_path / "out" / "deep"
    folder.mkdir()
    shots = {"a.png": picture(17, 20), "a.bmp": picture(21, 18, 3), "z.PNG": picture(17, 17, 4)}
    for name, image in shots.items():
        Image.fromarray(image).save(folder / name)
    for name in ("note.txt", ".hidden.png"):
        (folder / name).write_text("no image")
    called(monkeypatch, "--weights", path, "--batch", folder, out)
    net = program.load(path, 10)
    assert {p.name for p in out.iterdir()} == {f"{name}.features" for name in shots}
    for name, image in shots.items():
        assert (out / f"{name}.features").read_text() == program.feature_text(program.features(net, image))
    assert "features" in capsys.readouterr().err                                # the bar

    (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:100])       # damaged: named, and the rest goes on
    Image.fromarray(picture(16, 30)).save(folder / "c.png")                     # too small
    with pytest.raises(ValueError, match=rf"batch: 2 of 5 images of {folder} are left out, named above$"):
        called(monkeypatch, "--weights", path, "--batch", folder, out)
    told = capsys.readouterr().err
    assert f"left out: data.read_image: {folder / 'b.png'} must be a readable image" in told
    assert f"{folder / 'c.png'} must have at least 17x17 pixels for layer 10" in told and len(list(out.iterdir())) == 3
    with pytest.raises(ValueError, match="batch: 1 of 5 "):
        called(monkeypatch, "--weights", path, "--batch", folder, out, "-L", 3)
    assert len(list(out.iterdir())) == 4 and (out / "a.png.features").read_text().startswith("4 4 4\n")         # replaced

    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty must hold images, got none$"):
        called(monkeypatch, "--weights", path, "--batch", tmp_path / "empty", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def released(path, table, values):
    """A sparse file of full size: zeros, but for values, {number's place in the file: value}."""
    with path.open("wb") as f:
        f.truncate(BYTES[table])
        for at, value in values.items():
            f.seek(4 * at)
            f.write(np.array(value, "<f4").tobytes())
    return path


def test_the_program_as_a_process_on_a_file_of_full_size(tmp_path):
    """conv1 alone is read of the half gigabyte. Channel 1 of it is 2 * red, normalised, of its first pixel, and 5."""
    path = released(tmp_path / "net_weight_0", "fast", {363: 2, 34848 + 1: 5})
    shots = [picture(11, 16), picture(15, 11, 3)]
    stream = b"".join(map(ppm, shots)) + b"P6\n11 11\n255\ncut"
    done = subprocess.run(command("overfeat_features.py", "--weights", path, "-p", "-L", 1, "--backend", "numpy"), input=stream,
                          capture_output=True, timeout=100)
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == (
        b"error: overfeat_features.pictures: picture 3 of standard input must have 363 bytes of pixels, got 3")
    (tmp_path / "text").write_bytes(done.stdout)
    found = program.read_features(tmp_path / "text")
    assert [a.shape for a in found] == [(96, 1, 2), (96, 2, 1)]
    for a, image in zip(found, shots):
        red = image[:5:4, :5:4, 0][:a.shape[1], :a.shape[2]]
        assert_allclose(a[1], (red - 118.380948) / 61.896913 * 2 + 5, rtol=1e-5, atol=1e-5)
        assert not a[[0, *range(2, 96)]].any()


@pytest.mark.slow
def test_the_whole_accurate_net_classifies(tmp_path, monkeypatch, capsys):
    """A file of zeros but for biases, 0.6 GB (sparse); the weights in our layout, another 0.6 GB of memory."""
    for name, table in REAL.items():
        monkeypatch.setitem(TABLES, name, table)
    places = {b: 1 for _, _, b in RELEASED["accurate"][:-1]}
    last = RELEASED["accurate"][-1][2]
    path = released(tmp_path / "net_weight_1", "accurate", {**places, last + 448: 6, last + 7: 5, last + 999: 4})
    Image.fromarray(picture(231, 231)).save(tmp_path / "a.png")
    called(monkeypatch, "--weights", path, "-l", "-n", 4, tmp_path / "a.png")
    total = 997 + math.exp(6) + math.exp(5) + math.exp(4)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [k for k, _ in lines] == ["448", "7", "999", "0"]
    assert_allclose([float(p) for _, p in lines], [math.exp(v) / total for v in (6, 5, 4, 0)], rtol=1e-5)
