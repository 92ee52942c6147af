"""One small SQL surface over SQLite and PostgreSQL: ``?`` parameters, tuples back, explicit transactions.

Rules: SQLite runs in WAL with ``synchronous=FULL``, so a committed transaction survives a power cut; PostgreSQL keeps
its own default (``synchronous_commit=on``). A statement is written once, in the dialect that both share; types are
named in SQLite's words and translated. Nothing outside this file knows which database it talks to.
A value that no column holds is refused before it is sent (WireError): it is its sender's mistake, which another attempt
would only repeat, and PostgreSQL would drop the whole transaction for it.
"""

from __future__ import annotations

import contextlib
import math
import sqlite3
import threading
from typing import TYPE_CHECKING, Any, Protocol

from edgepriv.errors import (
    ConfigError,
    MissingDependencyError,
    StorageFullError,
    TemporaryError,
    UnavailableError,
    WireError,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

Row = tuple[Any, ...]
BUSY_TIMEOUT_S = 10.0
MIGRATION_LOCK = 0x6564_6765  # "edge": PostgreSQL's advisory lock of whoever brings the schema up to date
_POSTGRES_TYPES = {" BLOB": " BYTEA", " INTEGER": " BIGINT", " REAL": " DOUBLE PRECISION"}


class Database(Protocol):
    """What the store needs of a database."""

    kind: str

    def execute(self, sql: str, params: Sequence[Any] = ()) -> int:
        """Run a statement; returns the number of rows it changed."""
        ...

    def executemany(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        """Run a statement once for each row."""
        ...

    def query(self, sql: str, params: Sequence[Any] = ()) -> list[Row]:
        """Rows of a SELECT, or of a statement with RETURNING."""
        ...

    def transaction(self) -> contextlib.AbstractContextManager[None]:
        """All statements inside are committed together at the end, or none of them on an exception."""
        ...

    def script(self, statements: Sequence[str]) -> None:
        """Run statements of a schema, translated where needed."""
        ...

    def schema_version(self) -> int:
        """Number of migrations that were applied."""
        ...

    def set_schema_version(self, version: int) -> None:
        """Note the number of migrations inside the running transaction."""
        ...

    def size_bytes(self) -> int:
        """Bytes that the database takes on its disk."""
        ...

    def close(self) -> None:
        """Close the connection."""
        ...


def _fitting(params: Sequence[Any]) -> Sequence[Any]:
    """The parameters of a statement; WireError where one is in no column's range."""
    for value in params:
        if (isinstance(value, int) and not -(1 << 63) <= value < 1 << 63) or (
            (isinstance(value, float) and not math.isfinite(value)) or (isinstance(value, str) and "\x00" in value)
        ):
            raise WireError("a value is out of the range that the store holds")
    return params


class SqliteDatabase:
    """SQLite in one file; one connection, usable from any thread, one statement at a time."""

    kind = "sqlite"

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path = path
        try:
            mode = "ro" if read_only else "rwc"
            self._db = sqlite3.connect(
                f"{path.resolve().as_uri()}?mode={mode}",
                uri=True,
                timeout=BUSY_TIMEOUT_S,
                isolation_level=None,
                check_same_thread=False,
            )
            if not read_only:
                self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("PRAGMA foreign_keys=ON")
        except sqlite3.Error as error:
            raise UnavailableError(
                f"cannot open the store {path}: {error}", hint="check the path and its owner"
            ) from None
        self._lock = threading.RLock()
        self._depth = 0

    def execute(self, sql: str, params: Sequence[Any] = ()) -> int:
        """See Database."""
        with self._lock, _sqlite_errors():
            return self._db.execute(sql, _fitting(params)).rowcount

    def executemany(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        """See Database."""
        with self._lock, _sqlite_errors():
            self._db.executemany(sql, [_fitting(row) for row in rows])

    def query(self, sql: str, params: Sequence[Any] = ()) -> list[Row]:
        """See Database."""
        with self._lock, _sqlite_errors():
            return self._db.execute(sql, _fitting(params)).fetchall()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """See Database; nests (the outermost one commits)."""
        with self._lock:
            if self._depth == 0:
                self.execute("BEGIN IMMEDIATE")
            self._depth += 1
            try:
                yield
            except BaseException:
                self._depth -= 1
                if self._depth == 0:
                    self._db.rollback()
                raise
            self._depth -= 1
            if self._depth == 0:
                self._commit()

    def _commit(self) -> None:
        try:
            self.execute("COMMIT")
        except Exception:
            self._db.rollback()
            raise

    def script(self, statements: Sequence[str]) -> None:
        """See Database."""
        for statement in statements:
            self.execute(statement)

    def schema_version(self) -> int:
        """See Database."""
        return int(self.query("PRAGMA user_version")[0][0])

    def set_schema_version(self, version: int) -> None:
        """See Database."""
        self.execute(f"PRAGMA user_version = {int(version)}")

    def size_bytes(self) -> int:
        """See Database."""
        pages, free, size = (
            int(self.query(f"PRAGMA {p}")[0][0]) for p in ("page_count", "freelist_count", "page_size")
        )
        return (pages - free) * size

    def close(self) -> None:
        """See Database."""
        with self._lock:
            self._db.close()


@contextlib.contextmanager
def _sqlite_errors() -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        text = str(error)
        if "full" in text or "disk I/O" in text:
            raise StorageFullError(f"the store cannot write: {text}", hint="free disk space on the gateway") from error
        if "locked" in text or "busy" in text:
            raise TemporaryError("the store is busy") from error
        raise


class PostgresDatabase:
    """PostgreSQL by URL; one connection, reconnected by the caller's next attempt after a failure."""

    kind = "postgresql"

    def __init__(self, url: str) -> None:
        try:
            import psycopg
        except ImportError:
            raise MissingDependencyError(
                "PostgreSQL needs psycopg", hint="pip install 'edgepriv[gateway,postgres]'"
            ) from None
        self._psycopg, self._url = psycopg, url
        self._lock = threading.RLock()
        self._depth = 0
        self._db = self._connect()

    def _connect(self) -> Any:
        try:
            return self._psycopg.connect(self._url, autocommit=True, connect_timeout=10)
        except self._psycopg.Error:
            raise UnavailableError(
                "cannot connect to PostgreSQL", hint="check the URL in the file that [store] url_file names"
            ) from None

    def _run(self, sql: str, params: Sequence[Any]) -> Any:
        with self._lock, self._errors():
            self._reconnect()
            return self._db.execute(_placeholders(sql), _fitting(params))

    def _reconnect(self) -> None:
        """A server that was there once and is away now is a matter of time, not of the configuration."""
        if self._db.closed and self._depth == 0:
            try:
                self._db = self._connect()
            except UnavailableError as error:
                raise TemporaryError(str(error)) from error

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except self._psycopg.errors.DiskFull as error:
            raise StorageFullError("PostgreSQL's disk is full", hint="free space on its server") from error
        except self._psycopg.OperationalError as error:
            raise TemporaryError("PostgreSQL did not answer") from error
        except self._psycopg.DataError as error:
            raise WireError("a value is out of the range that the store holds") from error
        except self._psycopg.Error as error:
            raise TemporaryError(f"PostgreSQL refused a statement: {type(error).__name__}") from error

    def execute(self, sql: str, params: Sequence[Any] = ()) -> int:
        """See Database."""
        return int(self._run(sql, params).rowcount)

    def executemany(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        """See Database."""
        with self._lock, self._errors():
            self._reconnect()
            with self._db.cursor() as cursor:
                cursor.executemany(_placeholders(sql), [_fitting(row) for row in rows])

    def query(self, sql: str, params: Sequence[Any] = ()) -> list[Row]:
        """See Database."""
        return list(self._run(sql, params).fetchall())

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """See Database; nests (the outermost one commits)."""
        with self._lock:
            if self._depth == 0:
                self._run("BEGIN", ())
            self._depth += 1
            try:
                yield
            except BaseException:
                self._depth -= 1
                if self._depth == 0:
                    self._roll_back()
                raise
            self._depth -= 1
            if self._depth == 0:
                self._commit()

    def _commit(self) -> None:
        """Commit on the connection that has the transaction, never on another one."""
        try:
            with self._errors():
                self._db.execute("COMMIT")
        except BaseException:
            self._roll_back()
            raise

    def _roll_back(self) -> None:
        """Leave the transaction; a connection that cannot is given up, and the server does it."""
        try:
            self._db.execute("ROLLBACK")
        except self._psycopg.Error:
            self._db.close()

    def script(self, statements: Sequence[str]) -> None:
        """See Database."""
        for statement in statements:
            translated = statement.replace("INTEGER PRIMARY KEY AUTOINCREMENT", "BIGSERIAL PRIMARY KEY")
            for ours, theirs in _POSTGRES_TYPES.items():
                translated = translated.replace(ours, theirs)
            self._run(translated, ())

    def schema_version(self) -> int:
        """See Database; one process at a time until the transaction ends, because even IF NOT EXISTS collides."""
        with self.transaction():
            self._run("SELECT pg_advisory_xact_lock(?)", (MIGRATION_LOCK,))
            self._run("CREATE TABLE IF NOT EXISTS schema_version (version BIGINT NOT NULL)", ())
            rows = self.query("SELECT version FROM schema_version")
        return int(rows[0][0]) if rows else 0

    def set_schema_version(self, version: int) -> None:
        """See Database."""
        self._run("DELETE FROM schema_version", ())
        self._run("INSERT INTO schema_version (version) VALUES (?)", (version,))

    def size_bytes(self) -> int:
        """See Database."""
        return int(self.query("SELECT pg_database_size(current_database())")[0][0])

    def close(self) -> None:
        """See Database."""
        self._db.close()


def _placeholders(sql: str) -> str:
    return sql.replace("%", "%%").replace("?", "%s")


def open_database(sqlite_path: Path, url_file: Path | None, *, read_only: bool = False) -> Database:
    """Open PostgreSQL where a URL file is given, SQLite otherwise.

    Raises:
        ConfigError: the URL file is missing or does not hold a PostgreSQL URL.
        UnavailableError: the database cannot be opened.
    """
    if url_file is None:
        return SqliteDatabase(sqlite_path, read_only=read_only)
    try:
        url = url_file.read_text().strip()
    except OSError:
        raise ConfigError(f"cannot read {url_file}, which [store] url_file names") from None
    if not url.startswith(("postgresql://", "postgres://")):
        raise ConfigError(f"{url_file} does not hold a postgresql:// URL")
    return PostgresDatabase(url)
