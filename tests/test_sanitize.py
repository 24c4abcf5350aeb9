"""The project's own kernels under AddressSanitizer and ThreadSanitizer, on the CPU: python -m pytest -m sanitize, some minutes."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tinydet import emulate

ROOT = Path(__file__).resolve().parent.parent
# Every op, layer and loss forward and backward; tiles of convolution with ragged borders; what has no gradient; sizes on both sides of a border
TESTS = {"test_every_op.py": "test_backward_may_run_twice", "test_conv.py": "ragged and 32-32", "test_sort.py": "257 or 65",
         "test_scan.py": "257 or 2049", "test_nms.py": "limit or last_bit", "test_batch_norm.py": "border or 257", "test_optim.py": "257 or border"}


@pytest.mark.sanitize
@pytest.mark.parametrize("file", TESTS)
@pytest.mark.parametrize("mode", ["address", "thread", "thread blocks"])
def test_every_kernel_is_silent(mode, file):
    command = emulate.sanitizer_command(mode)
    if isinstance(command, str):
        pytest.skip(command)
    environment, prefix = command
    done = subprocess.run([*prefix, sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", f"tests/{file}",
                           "-k", f"emulated and ({TESTS[file]})", "-m", "not gpu and not slow"],
                          cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0 and re.search(r"[1-9]\d* passed", done.stdout), done.stdout[-3000:] + done.stderr[-2000:]
