"""Tables of the gateway's store, as numbered migrations: never edit one that was released, append the next.

A migration only adds (tables, columns with a default), so that the release before still runs on the store: an upgrade
can go back by one version.

Ids are local integers; parties are full names (``dev-cam1``); times are Unix seconds of the gateway's clock unless a
column says otherwise; digests are 32 raw bytes. Rows of ``frames`` and ``outputs`` outlive their content as
tombstones (``erased = 1``) until their epoch is closed, so that a replay of something erased is still a duplicate.
A closed epoch keeps its id for ever and nothing else: messages of it are refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gateway.database import Database

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE epochs (
            id INTEGER PRIMARY KEY AUTOINCREMENT, epoch_id BLOB NOT NULL UNIQUE, party TEXT NOT NULL,
            seq INTEGER NOT NULL, created INTEGER NOT NULL, digest BLOB NOT NULL UNIQUE, raw BLOB,
            received REAL NOT NULL, closed INTEGER NOT NULL DEFAULT 0)""",
        "CREATE INDEX epochs_by_party ON epochs (party, id)",
        """CREATE TABLE epoch_recipients (
            epoch INTEGER NOT NULL, key_id BLOB NOT NULL, PRIMARY KEY (epoch, key_id))""",
        """CREATE TABLE frames (
            id INTEGER PRIMARY KEY AUTOINCREMENT, digest BLOB NOT NULL UNIQUE, epoch INTEGER NOT NULL,
            party TEXT NOT NULL, counter INTEGER NOT NULL, size INTEGER NOT NULL, received REAL NOT NULL,
            path TEXT, envelope BLOB, erased INTEGER NOT NULL DEFAULT 0, UNIQUE (epoch, counter))""",
        "CREATE INDEX frames_by_party ON frames (party, received)",
        """CREATE TABLE outputs (
            id INTEGER PRIMARY KEY AUTOINCREMENT, digest BLOB NOT NULL UNIQUE, epoch INTEGER NOT NULL,
            party TEXT NOT NULL, counter INTEGER NOT NULL, at REAL NOT NULL, model TEXT NOT NULL,
            model_digest BLOB NOT NULL, task TEXT NOT NULL, policy TEXT NOT NULL, bits REAL NOT NULL,
            body BLOB, received REAL NOT NULL, erased INTEGER NOT NULL DEFAULT 0)""",
        "CREATE INDEX outputs_by_party ON outputs (party, received)",
        "CREATE INDEX outputs_by_epoch ON outputs (epoch)",
        """CREATE TABLE windows (
            party TEXT NOT NULL, model TEXT NOT NULL, class INTEGER NOT NULL, start INTEGER NOT NULL,
            seconds INTEGER NOT NULL, count INTEGER NOT NULL, scored INTEGER NOT NULL, score_sum REAL NOT NULL,
            bits REAL NOT NULL, dirty INTEGER NOT NULL, PRIMARY KEY (party, model, class, start))""",
        "CREATE INDEX windows_by_start ON windows (start)",
        """CREATE TABLE transfers (
            party TEXT NOT NULL, ref BLOB NOT NULL, what TEXT NOT NULL, size INTEGER NOT NULL,
            chunk_bytes INTEGER NOT NULL, digest BLOB NOT NULL, round INTEGER NOT NULL, expires REAL NOT NULL,
            meta BLOB NOT NULL, have BLOB NOT NULL, path TEXT NOT NULL, PRIMARY KEY (party, ref))""",
        """CREATE TABLE devices (
            party TEXT NOT NULL PRIMARY KEY, first_seen REAL NOT NULL, last_seen REAL NOT NULL,
            epoch INTEGER NOT NULL DEFAULT 0, status BLOB, status_at REAL NOT NULL DEFAULT 0)""",
        """CREATE TABLE objects (
            ref BLOB NOT NULL PRIMARY KEY, digest BLOB NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL,
            size INTEGER NOT NULL, path TEXT NOT NULL, added REAL NOT NULL, meta BLOB NOT NULL)""",
        """CREATE TABLE rounds (
            number INTEGER NOT NULL PRIMARY KEY, state TEXT NOT NULL, record BLOB NOT NULL,
            snapshot BLOB, started REAL NOT NULL, updated REAL NOT NULL)""",
        """CREATE TABLE uploads (
            round INTEGER NOT NULL, party TEXT NOT NULL, digest BLOB NOT NULL, path TEXT NOT NULL,
            size INTEGER NOT NULL, meta BLOB NOT NULL, state TEXT NOT NULL, received REAL NOT NULL,
            PRIMARY KEY (round, party))""",
        """CREATE TABLE commands (
            id INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, actor TEXT NOT NULL, action TEXT NOT NULL,
            args BLOB NOT NULL, state TEXT NOT NULL, result BLOB)""",
        """CREATE TABLE audit (
            id INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, actor TEXT NOT NULL, action TEXT NOT NULL,
            detail BLOB NOT NULL)""",
        """CREATE TABLE alerts (
            id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, subject TEXT NOT NULL, severity TEXT NOT NULL,
            text TEXT NOT NULL, raised REAL NOT NULL, cleared REAL)""",
        "CREATE TABLE meta (name TEXT NOT NULL PRIMARY KEY, value BLOB NOT NULL)",
    ),
    (
        """CREATE TABLE reports (
            kind TEXT NOT NULL, subject TEXT NOT NULL, sender TEXT NOT NULL, at REAL NOT NULL, body BLOB NOT NULL,
            PRIMARY KEY (kind, subject))""",
        "CREATE INDEX devices_by_seen ON devices (last_seen)",
        "CREATE INDEX alerts_open ON alerts (cleared)",
    ),
    (
        """CREATE TABLE round_parts (
            number INTEGER NOT NULL, part TEXT NOT NULL, snapshot BLOB NOT NULL, PRIMARY KEY (number, part))""",
    ),
    (
        """CREATE TABLE model_windows (
            party TEXT NOT NULL, digest BLOB NOT NULL, class INTEGER NOT NULL, start INTEGER NOT NULL,
            count INTEGER NOT NULL, PRIMARY KEY (party, digest, class, start))""",
        "CREATE INDEX model_windows_by_start ON model_windows (start)",
    ),
    ("ALTER TABLE commands ADD COLUMN expires REAL NOT NULL DEFAULT 0",),
)


def migrate(database: Database) -> int:
    """Apply the migrations that are missing, all or none; returns the schema's version.

    Processes that begin on an empty database at the same time (gateway and pages) take turns.

    Raises:
        ConfigError: the store was written by a newer release.
    """
    from edgepriv.errors import ConfigError

    version = database.schema_version()
    if version > len(MIGRATIONS) + 1:
        raise ConfigError(
            f"the store has schema {version}, this release knows {len(MIGRATIONS)}",
            hint="install the newer release again",
        )
    if version < len(MIGRATIONS):
        with database.transaction():
            for number in range(database.schema_version(), len(MIGRATIONS)):  # another process may have been first
                database.script(MIGRATIONS[number])
                database.set_schema_version(number + 1)
    return len(MIGRATIONS)
