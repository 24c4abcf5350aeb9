"""The project's own kernels under AddressSanitizer and ThreadSanitizer, on the CPU: python -m pytest -m sanitize, some minutes."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import KERNELS
from tinydet import cuda, emulate

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.sanitize
@pytest.mark.parametrize("mode", ["address", "thread", "thread blocks"])
def test_every_kernel_is_silent(mode):
    """On the tests that conftest marks "kernels"; of their files alone, as not every library bears AddressSanitizer."""
    command = emulate.sanitizer_command(mode)
    if isinstance(command, str):
        pytest.skip(command)
    environment, prefix = command
    done = subprocess.run([*prefix, sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider",
                           *(f"tests/{stem}.py" for stem in KERNELS), "-m", "kernels and not gpu"], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0 and re.search(r"[1-9]\d* passed", done.stdout), done.stdout[-3000:] + done.stderr[-2000:]


def test_every_kernel_file_has_tests_among_them():
    assert {f"test_{file.removesuffix('.cu')}" for file in cuda.files()} - {"test_sgd"} <= KERNELS.keys()
    assert "test_optim" in KERNELS                                      # which has those of SGD
