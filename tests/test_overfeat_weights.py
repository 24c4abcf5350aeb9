"""OverFeat's released files: where the arrays stand, a sparse file of full size, a tiny net's file; and all that is refused."""
import dataclasses

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from conftest import BACKENDS
from tinydet import to_numpy, use
from tinydet.models import overfeat_weights
from tinydet.models.overfeat import TABLES, OverFeat, Spec, Table
from tinydet.models.overfeat_weights import layout, load_published, read, recognise

# Shape, offset of the weight, offset of the bias, in floats (notes, 6.1)
RELEASED = {
    "fast": [((96, 3, 11, 11), 0, 34848), ((256, 96, 5, 5), 34944, 649344), ((512, 256, 3, 3), 649600, 1829248),
             ((1024, 512, 3, 3), 1829760, 6548352), ((1024, 1024, 3, 3), 6549376, 15986560), ((3072, 1024, 6, 6), 15987584, 129233792),
             ((4096, 3072, 1, 1), 129236864, 141819776), ((1000, 4096, 1, 1), 141823872, 145919872)],
    "accurate": [((96, 3, 7, 7), 0, 14112), ((256, 96, 7, 7), 14208, 1218432), ((512, 256, 3, 3), 1218688, 2398336),
                 ((512, 512, 3, 3), 2398848, 4758144), ((1024, 512, 3, 3), 4758656, 9477248), ((1024, 1024, 3, 3), 9478272, 18915456),
                 ((4096, 1024, 5, 5), 18916480, 123774080), ((4096, 4096, 1, 1), 123778176, 140555392),
             ((1000, 4096, 1, 1), 140559488, 144655488)],
}
BYTES = {"fast": 583_683_488, "accurate": 578_625_952}
TINY = Table((("conv1", 4, 3, 2, 0, 2), ("conv2", 5, 3, 1, 1, 3)), 2, (("fc3", 6), ("fc4", 3)), (("fc1", 3),))


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(TABLES, "tiny", TINY)


def make(table="tiny", dtype=np.float64, **more):
    return OverFeat(Spec(("a", "b", "c"), table, **more), np.random.default_rng(0), dtype)


def released(seed=1):
    """Weights and biases of a file of the tiny net, in order."""
    rng, shapes = np.random.default_rng(seed), [(4, 3, 3, 3), (5, 4, 3, 3), (6, 5, 2, 2), (3, 6, 1, 1), (3, 3, 1, 1)]
    drawn = [(rng.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape), rng.uniform(0.1, 0.3, shape[0])) for shape in shapes]
    return [a.astype("<f4") for pair in drawn for a in pair]


def write(folder, arrays):
    path = folder / "net_weight_7"
    path.write_bytes(b"".join(a.tobytes() for a in arrays))
    return path


@pytest.mark.parametrize("table", ["fast", "accurate"])
def test_arrays_stand_where_the_released_files_have_them(table):
    places, total = layout(TABLES[table])
    assert 4 * total == BYTES[table]
    found = list(places.values())
    assert [(w[1], w[0], b[0]) for w, b in zip(found[::2], found[1::2])] == RELEASED[table]
    assert [b[1] for b in found[1::2]] == [(shape[0],) for shape, *_ in RELEASED[table]]
    assert list(places)[::2] == [f"trunk.conv{k}.w" for k in range(1, len(TABLES[table].trunk) + 1)] + [
        f"classifier.{name}.w" for name in ({"fast": ("fc6", "fc7"), "accurate": ("fc7", "fc8")}[table])] + ["classifier.out.w"]


@pytest.mark.parametrize("table", ["fast", "accurate"])
def test_a_sparse_file_of_full_size(tmp_path, table):
    """First and last number of every array; nothing else of the file is read."""
    path, wanted = tmp_path / "net_weight", {}
    with path.open("wb") as f:
        f.truncate(BYTES[table])
        for k, (shape, w, b) in enumerate(RELEASED[table]):
            for name, first, size in (("w", w, int(np.prod(shape))), ("b", b, shape[0])):
                wanted[k, name] = 4 * k + (name == "b") + 1.0, 4 * k + (name == "b") + 3.0
                for at, value in zip((first, first + size - 1), wanted[k, name]):
                    f.seek(4 * at)
                    f.write(np.array(value, "<f4").tobytes())
    assert recognise(path) == table
    arrays = list(read(path, table).values())
    for k, pair in enumerate(zip(arrays[::2], arrays[1::2])):
        for name, a in zip("wb", pair):
            assert (a.flat[0], a.flat[a.size - 1]) == wanted[k, name] and not a.flags.writeable
            assert a.shape == (RELEASED[table][k][0] if name == "w" else RELEASED[table][k][0][:1])


# The released net, channels-first and in loops (notes, 6.2)

def conv(x, w, b, stride=1, pad=0):
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad)))
    k = w.shape[2]
    h, v = ((n - k) // stride + 1 for n in x.shape[1:])
    y = np.empty((len(w), h, v))
    for i, j in np.ndindex(h, v):
        y[:, i, j] = np.einsum("chw,dchw->d", x[:, i * stride:i * stride + k, j * stride:j * stride + k], w.astype(float)) + b
    return y


def pool(x, p):
    h, v = x.shape[1] // p, x.shape[2] // p
    return x[:, :h * p, :v * p].reshape(len(x), h, p, v, p).max((2, 4))


def scores_by_definition(arrays, image):
    def relu(x):
        return np.where(x > 1e-6, x, 0)
    x = (image.transpose(2, 0, 1).astype(float) - 118.380948) / 61.896913
    x = pool(relu(conv(x, *arrays[:2], stride=2)), 2)
    x = pool(relu(conv(x, *arrays[2:4], pad=1)), 3)
    return conv(relu(conv(relu(conv(x, *arrays[4:6])), *arrays[6:8])), *arrays[8:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_net_answers_as_the_released_one(tmp_path, backend):
    arrays, net = released(), make(regressor="SCR")
    before = {k: v.copy() for k, v in net.arrays().items()}
    image = np.random.default_rng(2).integers(0, 256, (40, 49, 3), np.uint8)
    with use(backend) as put:
        net.to(put)
        left = load_published(net, write(tmp_path, arrays))
        scores = to_numpy(net.forward(put(net.normalise(image[None])))[0])[0]
    expected = scores_by_definition(arrays, image)
    assert expected.shape == (3, 2, 3) and np.ptp(expected) > 0.01
    assert_allclose(scores.transpose(2, 0, 1), expected, rtol=0, atol=1e-5)       # the release's ReLU cuts at 1e-6
    assert set(left) == {k for k in before if k.startswith("regressor.")}
    for k, v in net.arrays().items():
        assert np.array_equal(to_numpy(v), before[k]) == (k in left), k


def test_float32_to_the_bit(tmp_path):
    arrays, net = released(), make(dtype=np.float32)
    load_published(net, write(tmp_path, arrays))
    assert_array_equal(net.params["classifier.fc3.w"], arrays[4].transpose(2, 3, 1, 0), strict=True)
    assert_array_equal(net.params["trunk.conv2.b"], arrays[3], strict=True)


@pytest.mark.parametrize("damage, told", [
    (lambda c: c[:-1], r"must have 1,824 bytes, as 'tiny' of 3 classes and width 1\.0 needs, got 1,823$"),
    (lambda c: c[:1000], r"must have 1,824 bytes.*got 1,000$"),
    (lambda c: c + b"\0\0\0\0", r"got 1,828$"),
    (lambda c: b"", r"got 0$"),
    (lambda c: c[:-4] + np.array(np.nan, "<f4").tobytes(), r"net_weight_7: classifier\.out\.b must be finite, got NaN or infinity$"),
    (lambda c: c[:428] + np.array(np.inf, "<f4").tobytes() + c[432:], r"trunk\.conv1\.w must be finite"),        # its last of 108
], ids=["a byte short", "truncated", "too long", "empty", "NaN at the end", "infinity"])
def test_a_damaged_file_is_refused_and_the_net_unchanged(tmp_path, monkeypatch, damage, told):
    monkeypatch.setattr(overfeat_weights, "BLOCK", 8)
    net, path = make(), write(tmp_path, released())
    before = {k: v.copy() for k, v in net.arrays().items()}
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=told) as error:
        load_published(net, path)
    assert str(path) in str(error.value)
    for k, v in net.arrays().items():
        assert_array_equal(v, before[k])


@pytest.mark.parametrize("more, told", [(dict(k=3), "k 3, pool 3, background False"), (dict(pool=2), "k 2, pool 2, background False"),
                                        (dict(background=True), "k 2, pool 3, background True")])
def test_a_net_of_another_k_or_pool_or_with_background_is_refused_and_unchanged(tmp_path, more, told):
    net, path = make(**more), write(tmp_path, released())
    before = {k: v.copy() for k, v in net.arrays().items()}
    with pytest.raises(ValueError, match=rf"^overfeat_weights\.load_published: for .*net_weight_7 the net must have k 2, pool 3 and no "
                                         rf"background class, as 'tiny' has, got {told}$"):
        load_published(net, path)
    for k, v in net.arrays().items():
        assert_array_equal(v, before[k])
    load_published(make(k=2, pool=3), path)                                 # named, but the table's


def test_what_is_no_file_of_this_net_is_refused(tmp_path, monkeypatch):
    net = make()
    for run in (recognise, lambda path: load_published(net, path)):
        with pytest.raises(FileNotFoundError, match=r"^overfeat_weights\.\w+: there is no file .*missing"):
            run(tmp_path / "missing")
        with pytest.raises(ValueError, match=r"^overfeat_weights\.\w+: .* must be a file, got a folder"):
            run(tmp_path)
    path = write(tmp_path, released())
    with pytest.raises(ValueError, match=r"net of 1000 classes, 583,683,488 \(fast\), 578,625,952 \(accurate\), .*, got 1,824$"):
        recognise(path)
    assert recognise(path, 3) == "tiny"
    monkeypatch.setitem(TABLES, "tiny", dataclasses.replace(TINY, norm=True))                 # no file has batch norms
    with pytest.raises(ValueError, match=r"578,625,952 \(accurate\), got 1,824$"):
        recognise(path, 1000)
    with pytest.raises(ValueError, match=r"net of 3 classes, .* \(accurate\), got 1,824$"):
        recognise(path, 3)
    monkeypatch.setitem(TABLES, "tiny", TINY)
    monkeypatch.setitem(TABLES, "other", Table(TINY.trunk, 2, (("fc3", 7), ("fc4", 3))))
    with pytest.raises(ValueError, match=r"as 'other' of 3 classes and width 1\.0 needs, got 1,824, the size of 'tiny'$"):
        load_published(make("other"), path)
