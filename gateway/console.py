"""What all commands of ``edgepriv-gateway`` share: options, store, the way to the daemon, how results are shown."""

from __future__ import annotations

import datetime as dt
import getpass
import json
import os
import re
import secrets
import shutil
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgepriv.errors import ConfigError, MissingFileError, TemporaryError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gateway.config import Config
    from gateway.store import Store

CONFIG = click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    default=Path("/etc/edgepriv/gateway.toml"),
    show_default=True,
    help="The gateway's configuration file.",
)
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
START_S = 20.0
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


def parse_time(text: str) -> float:
    """Unix seconds of an age (``10m``) or an ISO date, or ConfigError."""
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text):
        return time.time() - float(match[1]) * _UNITS[match[2]]
    try:
        moment = dt.datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        raise ConfigError(
            f"{text!r} is not a time", hint="an age like 10m, 2h, 7d, or a date like 2026-11-20"
        ) from None
    return moment.timestamp()


def load_config(path: Path) -> Config:
    """Read the configuration."""
    from gateway.config import load

    return load(path)


def _owner_of_state(config: Config) -> os.stat_result | None:
    """Whose the state folder is, where we are root and it is somebody else's (a package's service user)."""
    if os.geteuid() != 0 or not config.gateway.state.is_dir():
        return None
    found = config.gateway.state.stat()
    return found if found.st_uid != 0 else None


@contextmanager
def as_state_owner(config: Config) -> Iterator[None]:
    """Root works on the state folder as its owner: a file of root in it could not be read by the daemon."""
    owner = _owner_of_state(config)
    if owner is None:
        yield
        return
    group = os.getegid()
    os.setegid(owner.st_gid)
    os.seteuid(owner.st_uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(group)


@contextmanager
def handed_over(config: Config, file: Path) -> Iterator[Path]:
    """A path of ``file`` that the daemon can read: its unit sees no home folder, so root's file is copied for it."""
    try:
        file.stat()
    except OSError as error:
        raise MissingFileError(f"cannot read {file}: {error.strerror}") from None
    if _owner_of_state(config) is None:
        yield file.resolve()
        return
    try:
        source = file.open("rb")
    except OSError as error:
        raise MissingFileError(f"cannot read {file}: {error.strerror}") from None
    copy = config.gateway.state / "incoming" / secrets.token_hex(8)
    with source, as_state_owner(config):
        copy.parent.mkdir(mode=0o700, exist_ok=True)
        with copy.open("xb") as target:
            shutil.copyfileobj(source, target)
    try:
        yield copy
    finally:
        copy.unlink(missing_ok=True)


def make_state(config: Config) -> None:
    """Make the state folder where it is not there yet (UnavailableError: this user may not)."""
    state = config.gateway.state
    try:
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        hint = "[gateway] state names a folder that the gateway's user may write"
        raise UnavailableError(f"cannot make the state folder {state}: {error.strerror}", hint=hint) from None


class opened_store:  # noqa: N801 - used like a function: with opened_store(config)
    """The store of a configuration, closed at the end."""

    def __init__(self, config: Config, *, create: bool = False) -> None:
        from gateway.daemon import open_store

        if not create and not config.store.url_file and not (config.gateway.state / "gateway.db").is_file():
            raise MissingFileError(
                f"no store in {config.gateway.state}",
                hint="the gateway makes it when it first runs: edgepriv-gateway run",
            )
        if create:
            make_state(config)
        self._owner = as_state_owner(config)
        self._owner.__enter__()
        try:
            self._store = open_store(config, create=create)
        except BaseException:
            self._owner.__exit__(None, None, None)
            raise

    def __enter__(self) -> Store:
        return self._store

    def __exit__(self, *_: object) -> None:
        self._store.close()
        self._owner.__exit__(None, None, None)


def is_running(config: Config) -> bool:
    """Whether a daemon holds the state folder's lock."""
    import fcntl

    try:
        with (config.gateway.state / "lock").open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def ask_daemon(config: Config, action: str, args: dict[str, Any], timeout_s: float = 20.0) -> dict[str, Any]:
    """Hand a command to the daemon and wait for its result.

    Raises:
        TemporaryError: it does not run (nothing was asked for then), or did not answer in time (`commands.wait`).
        EdgeprivError: it refused.
    """
    from gateway import commands

    if not is_running(config):
        _await_start(config, min(timeout_s, START_S))
    with opened_store(config) as store:
        number = commands.submit(store, actor(), action, args, time.time(), timeout_s=timeout_s)
        return commands.wait(store, number, timeout_s)


def _await_start(config: Config, timeout_s: float) -> None:
    """A daemon that is about to start is waited for, by what it writes: asking for its lock could take that from it."""
    click.echo(f"the gateway does not run; waiting up to {timeout_s:.0f} s for it to start", err=True)
    status, deadline = config.gateway.state / "status.json", time.monotonic() + timeout_s
    before = _written(status)
    while _written(status) == before:
        if time.monotonic() > deadline:
            raise TemporaryError(
                "the gateway does not run, and nothing was asked of it", hint="systemctl start edgepriv-gateway"
            )
        time.sleep(0.2)


def _written(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def actor() -> str:
    """Who types, for the audit log."""
    try:
        return f"cli:{getpass.getuser()}"
    except (KeyError, OSError):
        return f"cli:{os.getuid()}"


def assignment(text: str) -> tuple[str, Any]:
    """``KEY=VALUE`` with a JSON value where it parses (ConfigError otherwise)."""
    key, sign, value = text.partition("=")
    if not sign:
        raise ConfigError(f"{text!r} is not KEY=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def jsonable(value: Any) -> Any:
    """Bytes as hex, through maps and lists."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return value


def json_map(value: dict[str, Any]) -> dict[str, Any]:
    """`jsonable` of a map."""
    return {key: jsonable(item) for key, item in value.items()}


def show(document: dict[str, Any], as_json: bool, lines: list[str]) -> None:
    """Print the document, or the lines for people."""
    click.echo(json.dumps(document) if as_json else "\n".join(lines))
