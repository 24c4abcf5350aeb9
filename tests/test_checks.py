import numpy as np
import pytest

from tinydet import checks


one = np.ones(2)


@pytest.mark.parametrize("pad, sides", [
    (0, (0, 0, 0, 0)), (3, (3, 3, 3, 3)), ((2, 1, 0, 4), (2, 1, 0, 4)), ([2, 1, 0, 4], (2, 1, 0, 4)), (np.int64(1), (1, 1, 1, 1)),
    ((np.uint8(1), 2, 3, 4), (1, 2, 3, 4)),
])
def test_padding_gives_four_python_integers(pad, sides):
    result = checks.padding("op.function", pad)
    assert result == sides and {type(side) for side in result} == {int}


def test_a_list_of_sides_is_not_kept():
    pad = [1, 2, 3, 4]
    result = checks.padding("op.function", pad)
    pad[0] = 9
    assert result == (1, 2, 3, 4)


@pytest.mark.parametrize("y", [np.array([-1, 0, 1]), np.array([0, 1, 1], np.uint8), np.array([[-1, 1]], np.int8), np.zeros(0, int)])
def test_ternary_labels_pass(y):
    checks.ternary("op.function", y, y.shape)


def test_shapes_are_read_as_written():
    for shape in (None, "(N, H, W, C)", "(2, 3, 4, 5)", "(N, 3, W, 5)"):
        checks.float_array("op.function", "x", np.zeros((2, 3, 4, 5)), shape)
    checks.float_array("op.function", "x", np.zeros(3, np.float32), "(3,)")


def test_what_is_right_passes():
    checks.same_dtype("op.function", a=one, b=np.zeros((3, 4)))
    checks.same_shape("op.function", [2], a=one, b=np.zeros(2, int))
    checks.finite("op.function", a=one, b=np.zeros(0))
    checks.whole("op.function", 1, size=1, stride=np.int8(3))
    checks.labels("op.function", np.array([-1, 0, 2]), 3, 3)
    checks.labels("op.function", np.zeros(0, np.uint8), 0, 3)


@pytest.mark.parametrize("function, args, error, message", [
    (checks.array, ("x", [1.0]), TypeError, "x must be an array, got list"),
    (checks.array, ("x", None), TypeError, "x must be an array, got NoneType"),
    (checks.float_array, ("x", [1.0]), TypeError, "x must be an array, got list"),
    (checks.float_array, ("x", np.ones(2, np.float16)), TypeError, "x must be float32 or float64, got float16"),
    (checks.float_array, ("x", one, "(R, 4)"), ValueError, r"x must have shape \(R, 4\), got \(2,\)"),
    (checks.float_array, ("x", np.ones((2, 3)), "(R, 4)"), ValueError, r"x must have shape \(R, 4\), got \(2, 3\)"),
    (checks.float_array, ("x", np.ones((3, 4)), "(2, 4)"), ValueError, r"x must have shape \(2, 4\), got \(3, 4\)"),
    (checks.padding, (-1,), ValueError, "pad must be at least 0, got -1"),
    (checks.padding, (1.0,), TypeError, "pad must be an integer, got 1.0"),
    (checks.padding, (True,), TypeError, "pad must be an integer, got True"),
    (checks.padding, ("same",), TypeError, "pad must be an integer, got 'same'"),
    (checks.padding, ((1, 2),), ValueError, r"pad must be a number or \(top, bottom, left, right\), got \(1, 2\)"),
    (checks.padding, ([0, 0, 0, 0, 0],), ValueError, r"pad must be a number or \(top, bottom, left, right\), got \[0, 0, 0, 0, 0\]"),
    (checks.padding, ((0, 0, 0, -2),), ValueError, "pad must be at least 0, got -2"),
    (checks.padding, ((0, None, 0, 0),), TypeError, "pad must be an integer, got None"),
    (checks.finite, (), ValueError, "x must be finite, got NaN or infinity"),
    (checks.ternary, ([0, 1], (2,)), TypeError, "labels must be an array, got list"),
    (checks.ternary, (one, (2,)), TypeError, "labels must be integers, got float64"),
    (checks.ternary, (one.astype(bool), (2,)), TypeError, "labels must be integers, got bool"),
    (checks.ternary, (np.zeros((2, 1), int), (2,)), ValueError, r"labels must have shape \(2,\), got \(2, 1\)"),
    (checks.ternary, (np.array([-2, 1]), (2,)), ValueError, r"labels must be -1, 0 or 1, got -2\.\.1"),
    (checks.ternary, (np.array([0, 2]), (2,)), ValueError, r"labels must be -1, 0 or 1, got 0\.\.2"),
    (checks.ternary, (np.array([0, 255], np.uint8), (2,)), ValueError, r"labels must be -1, 0 or 1, got 0\.\.255"),
    (checks.labels, (np.array([0, 3]), 2, 3), ValueError, r"labels must lie in -1\.\.2, got 0\.\.3"),
    (checks.labels, (np.array([-2, 0]), 2, 3), ValueError, r"labels must lie in -1\.\.2, got -2\.\.0"),
    (checks.labels, ([0, 1], 2, 3), TypeError, "labels must be an array, got list"),
    (checks.labels, (one, 2, 3), TypeError, "labels must be integers, got float64"),
    (checks.labels, (np.zeros(3, int), 2, 3), ValueError, r"labels must have shape \(2,\), got \(3,\)"),
])
def test_messages(function, args, error, message):
    with pytest.raises(error, match=rf"^op\.function: {message}$"):
        function("op.function", *args, **(dict(x=np.array([1, np.inf])) if function is checks.finite else {}))


def test_messages_name_the_argument_that_is_wrong():
    with pytest.raises(TypeError, match=r"^op\.function: dtypes must agree, got a float64, b float32$"):
        checks.same_dtype("op.function", a=one, b=one.astype(np.float32))
    with pytest.raises(TypeError, match=r"^op\.function: b must be an array, got list$"):
        checks.same_dtype("op.function", a=one, b=[1.0])
    with pytest.raises(ValueError, match=r"^op\.function: b must have shape \(2,\), got \(3,\)$"):
        checks.same_shape("op.function", [2], a=one, b=np.ones(3))
    with pytest.raises(TypeError, match=r"^op\.function: b must be an array, got tuple$"):
        checks.same_shape("op.function", (2,), a=one, b=(1.0, 1.0))
    with pytest.raises(ValueError, match=r"^op\.function: stride must be at least 1, got 0$"):
        checks.whole("op.function", 1, size=1, stride=0)
    with pytest.raises(TypeError, match=r"^op\.function: stride must be an integer, got 2.5$"):
        checks.whole("op.function", 1, size=np.int32(1), stride=2.5)


def test_booleans():
    assert checks.booleans("op.function", "x", [True, False], 2).tolist() == [True, False]
