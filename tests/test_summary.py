import numpy as np
import pytest

from conftest import distinct
from tinydet.layers import LRN, BatchNorm, Conv2D, Dropout, Flatten, Fork, Linear, MaxPool, ReLU, Residual, Sequential, Shared
from tinydet.summary import summary


def rng():
    return np.random.default_rng(0)


def conv(Cin, Cout, size, **options):
    return Conv2D(Cin, Cout, size, rng=rng(), std=0.0, **options), ReLU()


def test_the_convolutions_of_oquab_have_the_counts_of_the_notes():
    """oquab notes, sec. 1: 3,747,200 parameters up to the fifth pooling; maps of 55, 27, 13 and 6; multiply-adds in G."""
    net = Sequential(*conv(3, 96, 11, stride=4, pad=(2, 1, 2, 1)), LRN(), MaxPool(3, 2), *conv(96, 256, 5, pad=2), LRN(), MaxPool(3, 2),
                     *conv(256, 384, 3, pad=1), *conv(384, 384, 3, pad=1), *conv(384, 256, 3, pad=1), MaxPool(3, 2))
    found = summary(net, (1, 224, 224, 3))
    convs = [row for row in found.rows if row.layer.startswith("Conv2D")]
    assert [row.params for row in convs] == [34_944, 614_656, 885_120, 1_327_488, 884_992] and found.params == 3_747_200
    assert [row.output for row in found.rows if row.layer.startswith("MaxPool")] == [(1, 27, 27, 96), (1, 13, 13, 256), (1, 6, 6, 256)]
    assert [round(row.multiply_adds / 1e9, 3) for row in convs] == [0.105, 0.448, 0.150, 0.224, 0.150]
    assert convs[0].layer == "Conv2D 11x11/4 3 -> 96, pad (2, 1, 2, 1)" and convs[0].output == (1, 55, 55, 96)


def test_multiply_adds_are_those_of_the_loops():
    """Counted by the definition, padding included: one for every product of a weight."""
    x = distinct((2, 7, 6, 3), 0)
    net = Sequential(Conv2D(3, 4, 2, stride=2, pad=1, rng=rng(), dtype=np.float64), Flatten(), Linear(4 * 4 * 4, 5, rng=rng(), dtype=np.float64))
    rows = summary(net, x).rows
    assert [row.multiply_adds for row in rows] == [2 * 4 * 4 * 4 * (2 * 2 * 3), 0, 2 * 5 * 64]
    assert [row.output for row in rows] == [(2, 4, 4, 4), (2, 64), (2, 5)]


def test_shared_layers_count_each_run_and_frozen_and_idle_ones_are_told():
    class Net(Fork):
        def forward(self, x, train=False, rng=None):
            ys, cache = self.parts["heads"].forward([x, x[:, :3]], train, rng)
            return ys, cache
    net = Net(heads=Shared(Conv2D(2, 3, 3, rng=rng())), other=Residual(Sequential(BatchNorm(2).freeze(), Dropout())))
    found = summary(net, (1, 5, 5, 2))
    head, norm, _ = found.rows
    assert (head.name, head.runs, head.output, head.multiply_adds) == ("heads.layer", 2, (1, 1, 3, 3), (9 + 3) * 3 * 18)
    assert (norm.runs, norm.params, norm.trained) == (0, 4, 0)
    assert found.params == 57 + 4 and found.trained == 57
    text = str(found).splitlines()
    assert text[0].split() == ["name", "layer", "output", "parameters", "multiply-adds"]
    assert text[1].split() == ["heads.layer", "Conv2D", "3x3/1", "2", "->", "3", "1x1x3x3", "(2", "runs)", "57", "648"]
    assert text[2].split() == ["other.branch.0", "BatchNorm", "not", "run", "4", "frozen"]
    assert text[-1] == "61 parameters, 57 of them train; 648 multiply-adds"


def test_the_net_is_left_as_it_was():
    net = Sequential(Conv2D(2, 3, 3, rng=rng()), BatchNorm(3))
    before = {k: v.copy() for k, v in net.arrays().items()}
    summary(net, (1, 4, 4, 2))
    with pytest.raises(ValueError, match="holds no window"):
        summary(net, (1, 2, 2, 2))
    assert not any("forward" in vars(layer) for layer in net.leaves().values())
    assert all((before[k] == v).all() for k, v in net.arrays().items())


def test_a_single_layer_and_an_empty_net():
    assert summary(Linear(2, 3, rng=rng()), (4, 2)).multiply_adds == 24
    with pytest.raises(ValueError, match=r"^summary\.summary: net must hold a layer, got none"):
        summary(Sequential(), (1, 2))


def test_shapes_stand_for_zeros_of_the_nets_dtype_also_in_lists():
    net = Shared(Conv2D(2, 3, 1, rng=rng(), dtype=np.float64))
    assert summary(net, [(1, 4, 4, 2), (1, 2, 2, 2)]).multiply_adds == (16 + 4) * 6
    assert summary(net.parts["layer"], (1, 4, 4, 2)).multiply_adds == 16 * 6


def test_one_object_in_two_places_is_counted_once_and_a_forward_of_its_own_stays():
    relu = ReLU()
    own = relu.forward = lambda x, train=False, rng=None: ReLU.forward(relu, x)
    found = summary(Sequential(relu, Conv2D(2, 2, 1, rng=rng()), relu), (1, 4, 4, 2))
    assert [(row.name, row.runs) for row in found.rows] == [("0", 2), ("1", 1)]
    assert relu.forward is own


def test_a_convolution_to_one_channel():
    assert summary(Conv2D(2, 1, 3, rng=rng()), (1, 5, 4, 2)).multiply_adds == 3 * 2 * 18
