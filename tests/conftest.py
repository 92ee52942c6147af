"""Shared fixtures: where the public data sets lie."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with mnist/ and cifar10/, or a skip that says how to provide it."""
    path = Path(os.environ.get("EDGEPRIV_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not (path / "mnist").is_dir():
        pytest.skip(f"no test data at {path}: set EDGEPRIV_TEST_DATA to a folder with mnist/ and cifar10/")
    return path
