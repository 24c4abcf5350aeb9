import subprocess
import sys
import types

import numpy as np
import pytest

from conftest import BACKENDS
from tinydet import array_module, pick, to_numpy, use
from tinydet.backend import BACKENDS as KNOWN


def chosen():
    return pick(np.zeros(1), numpy="numpy", numba="numba")


def test_every_backend_is_tested():
    assert set(KNOWN) == set(BACKENDS)


def test_use_chooses_nests_and_restores():
    assert chosen() == "numba"                              # outside any block
    with use("numpy"):
        assert chosen() == "numpy"
        with use("numba"):
            assert chosen() == "numba"
        assert chosen() == "numpy"
    assert chosen() == "numba"


def test_an_exception_restores_the_earlier_backend():
    with use("numpy"):
        with pytest.raises(KeyError):
            with use("numba"):
                raise KeyError
        assert chosen() == "numpy"
    assert chosen() == "numba"


@pytest.mark.parametrize("name", ["torch", "", None])
def test_an_unknown_name_is_refused_at_once(name):
    with pytest.raises(ValueError, match=rf"^backend\.use: name must be one of numpy, numba, got {name!r}"):
        use(name)
    assert chosen() == "numba"


@pytest.mark.parametrize("backend", BACKENDS)
def test_put_and_an_op_without_a_numba_version(backend):
    with use(backend) as put:
        x = put(np.arange(3.0))
        assert pick(x, numpy="array code") == "array code"
    assert array_module(x) is np and array_module([1]) is np
    np.testing.assert_array_equal(to_numpy(x), [0, 1, 2])


def test_an_array_of_the_gpu_goes_to_the_cuda_version(monkeypatch):
    class ndarray:                                          # stands for cupy.ndarray
        def get(self):
            return np.arange(2)

    def forward():
        pass
    cupy = types.SimpleNamespace(ndarray=ndarray)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    x = ndarray()
    assert array_module(x) is cupy and array_module(np.zeros(1)) is np
    assert pick(x, numpy=forward, numba="numba", cuda="cuda") == "cuda"
    assert pick(np.zeros(1), numpy=forward, numba="numba", cuda="cuda") == "numba"
    np.testing.assert_array_equal(to_numpy(x), [0, 1])
    with pytest.raises(TypeError, match="this op has no CUDA version yet, got a ndarray on the GPU"):
        pick(x, numpy=forward)


def test_import_never_imports_cupy():
    """A stand-in that raises is first on the path, so that this also holds where CuPy is not installed."""
    code = ("import sys\n"
            "class Find:\n"
            "    def find_spec(self, name, *_):\n"
            "        assert name.split('.')[0] != 'cupy', 'cupy imported'\n"
            "sys.meta_path.insert(0, Find())\n"
            "import tinydet, tinydet.layers, tinydet.optim, tinydet.gradcheck, numpy as np\n"
            "from tinydet.ops import batch_norm, box_loss, boxes, conv, dropout, max_pool, merge, nms, offset_pool, relu, softmax_loss\n"
            "relu.forward(np.ones(1))\n"
            "assert 'cupy' not in sys.modules\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
