"""Gateway, pages and commands that begin on an empty database at the same time, as units do at the first start."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from gateway_site import Postgres

from gateway.database import open_database
from gateway.schema import MIGRATIONS, migrate

TOGETHER = 6


@pytest.fixture(scope="module")
def postgres(tmp_path_factory):
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    server = Postgres(tmp_path_factory.mktemp("postgres"))
    yield server
    server.close()


def begin_together(path, url_file):
    """Each opens a connection of its own and migrates at the same moment; what they say of the schema afterwards."""
    start = threading.Barrier(TOGETHER)

    def one(_):
        database = open_database(path, url_file)
        try:
            start.wait(20)
            migrate(database)
            return database.schema_version()
        finally:
            database.close()

    with ThreadPoolExecutor(TOGETHER) as pool:
        return list(pool.map(one, range(TOGETHER)))


def test_processes_that_begin_together_on_an_empty_postgresql_take_turns(postgres, tmp_path):
    for _ in range(5):
        postgres.reset()
        assert begin_together(tmp_path / "unused.db", postgres.url_file) == [len(MIGRATIONS)] * TOGETHER


def test_processes_that_begin_together_on_an_empty_sqlite_file_take_turns(tmp_path):
    for turn in range(5):
        assert begin_together(tmp_path / f"{turn}.db", None) == [len(MIGRATIONS)] * TOGETHER
