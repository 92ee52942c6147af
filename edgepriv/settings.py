"""Configuration: a TOML file into nested frozen dataclasses, the same way for device, gateway and risk service.

Rules: an unknown key is an error that names the nearest known one; a value of the wrong type is an error; relative
paths count from the file's folder; ``EDGEPRIV_<SECTION>__<KEY>`` in the environment overrides the file; secrets are
given by path only. A field of type ``Path`` or ``Path | None`` is resolved; ``dict`` fields take any table.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin, get_type_hints

from edgepriv.errors import ConfigError, MissingFileError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from collections.abc import Mapping

T = TypeVar("T")
NO_FILE = (
    "--config names another; commented ones are in deploy/examples, or /etc/edgepriv where the package is installed"
)
WORDS = {"str": "text", "int": "a whole number", "float": "a number", "bool": "true or false", "list": "a list"}


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file.

    Raises:
        MissingFileError: it does not exist.
        ConfigError: it is not TOML.
    """
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        raise MissingFileError(f"no such configuration file: {path}", hint=NO_FILE) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    except OSError as error:
        raise MissingFileError(f"cannot read {path}: {error.strerror}", hint=NO_FILE) from None


def load_settings(cls: type[T], path: Path, environment: Mapping[str, str] | None = None) -> T:
    """Read ``path`` into the dataclass ``cls``, whose fields are sections (dataclasses) or plain values."""
    table = read_toml(path)
    env = os.environ if environment is None else environment
    for name, value in env.items():
        if name.startswith("EDGEPRIV_") and "__" in name:
            section, _, key = name.removeprefix("EDGEPRIV_").lower().partition("__")
            if section in {f.name for f in dataclasses.fields(cls)}:  # type: ignore[arg-type]
                table.setdefault(section, {})[key] = _from_text(value)
    return build(cls, table, folder=path.resolve().parent, where=str(path))


def build(cls: type[T], table: Mapping[str, Any], *, folder: Path, where: str) -> T:
    """Check a table against a dataclass and build it, or raise ConfigError."""
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = get_type_hints(cls)
    for key, value in table.items():
        if key not in known:
            raise _unknown(key, value, hints, where)
    values = {
        key: _convert(hints[key], value, folder, f"{where}: {_named(key, value)}") for key, value in table.items()
    }
    for name, field in known.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ConfigError(f"{where}: {name!r} is missing")
    return cls(**values)


def _named(key: str, value: Any) -> str:
    return f"[{key}]" if isinstance(value, dict) else key


def _unknown(key: str, value: Any, hints: Mapping[str, Any], where: str) -> ConfigError:
    """What is wrong with a key or section that nobody knows, and what was meant."""
    sections = {name: cls for name, hint in hints.items() if (cls := _section(hint)) is not None}
    if isinstance(value, dict) and sections:
        tables = [name for name, hint in hints.items() if name in sections or get_origin(hint) is dict]
        near = difflib.get_close_matches(key, tables, n=1, cutoff=0.5)
        hint = f"did you mean [{near[0]}]?" if near else "known: " + ", ".join(f"[{name}]" for name in tables)
        return ConfigError(f"{where}: unknown section [{key}]", hint=hint)
    near = difflib.get_close_matches(key, hints, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(hints)}"
    homes = [f"[{name}]" for name, cls in sections.items() if key in {f.name for f in dataclasses.fields(cls)}]
    if homes:
        hint = f"it belongs below {' or '.join(homes)}"
    return ConfigError(f"{where}: unknown key {key!r}", hint=hint)


def _section(hint: Any) -> Any:
    """The dataclass that a field holds, or None."""
    options = get_args(hint) or (hint,)
    return next((o for o in options if isinstance(o, type) and dataclasses.is_dataclass(o)), None)


def _convert(hint: Any, value: Any, folder: Path, where: str) -> Any:
    options = [o for o in get_args(hint) if o is not type(None)] if type(None) in get_args(hint) else [hint]
    wanted = options[0]
    if dataclasses.is_dataclass(wanted) and isinstance(wanted, type):
        if not isinstance(value, dict):
            raise ConfigError(f"{where} must be a table")
        return build(wanted, value, folder=folder, where=where)
    if wanted is Path:
        if not isinstance(value, str):
            raise ConfigError(f"{where} must be a path")
        return folder / value
    if get_origin(wanted) is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{where} must be a list")
        inner = get_args(wanted)[0]
        return tuple(_convert(inner, item, folder, where) for item in value)
    if wanted is float and type(value) is int:
        return float(value)
    plain = get_origin(wanted) or wanted
    if plain is Any or (type(value) is plain):
        return value
    wanted_name, given = getattr(plain, "__name__", str(plain)), type(value).__name__
    was = "a decimal number" if given == "float" else WORDS.get(given, given)
    raise ConfigError(f"{where} must be {WORDS.get(wanted_name, wanted_name)}, not {was}")


def _from_text(text: str) -> Any:
    """A value of the environment: TOML where it parses (numbers, true, lists), else text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
