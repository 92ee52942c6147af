"""Where the public data sets lie, and an exit code that tells failures of real processes from all others."""

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


ONLY_SYSTEM_TESTS = 9  # an exit code that pytest does not use: tests/check runs these tests once more, alone


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    whole = not (session.shouldfail or session.shouldstop)  # -x: nobody knows what the other tests would have done
    if exitstatus == pytest.ExitCode.TESTS_FAILED and reporter and whole:
        failed = [report for kind in ("failed", "error") for report in reporter.stats.get(kind, [])]
        if failed and all("system" in getattr(report, "keywords", {}) for report in failed):
            session.exitstatus = ONLY_SYSTEM_TESTS
