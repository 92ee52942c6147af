"""Ten seconds of coverage-guided fuzzing where atheris is installed; hypothesis runs everywhere else."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed: pip install atheris")
def test_the_fuzzer_finds_nothing_in_ten_seconds(tmp_path):
    harness = Path(__file__).with_name("fuzz_cipher.py")
    command = [sys.executable, str(harness), "-max_total_time=10", "-max_len=600"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
