"""Configuration: TOML into frozen dataclasses; every mistake is named."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass, field
from pathlib import Path  # noqa: TC003 - the settings reader resolves the annotations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepriv.errors import ConfigError, EdgeprivError, MissingFileError
from edgepriv.settings import load_settings, read_toml


@dataclass(frozen=True, slots=True)
class Broker:
    url: str
    ca: Path | None = None
    timeout_s: float = 1.0
    retries: int = 3
    tls: bool = False


@dataclass(frozen=True, slots=True)
class Config:
    broker: Broker
    names: tuple[str, ...] = ()
    source: dict[str, Any] = field(default_factory=dict)


def load(folder, text, env=None):
    path = folder / "x.toml"
    path.write_text(text)
    return load_settings(Config, path, env or {})


GOOD = (
    'names = ["a", "b"]\n[broker]\nurl = "mqtt://h"\nca = "keys/ca.pem"\ntimeout_s = 2\n[source]\nkind = "x"\nn = 3\n'
)


def test_a_file_becomes_frozen_values_with_paths_from_its_folder(tmp_path):
    config = load(tmp_path, GOOD)
    assert config == Config(
        Broker("mqtt://h", tmp_path / "keys/ca.pem", timeout_s=2.0), ("a", "b"), {"kind": "x", "n": 3}
    )
    assert isinstance(config.broker.timeout_s, float)
    with pytest.raises(FrozenInstanceError):
        config.broker.url = "other"


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ('[broker]\nurl = "x"\ntimeout = 3', "unknown key 'timeout'", "timeout_s"),
        ('[borker]\nurl = "x"', r"unknown section \[borker\]", "did you mean [broker]?"),
        ("[zzz]", r"unknown section \[zzz\]", "known: [broker], [source]"),
        ('url = "x"', "unknown key 'url'", "it belongs below [broker]"),
        ('[broker]\nurl = "x"\nzzz = 3', "unknown key 'zzz'", "url, ca"),
        ("[broker]\nretries = 3", "'url' is missing", ""),
        ("names = []", "'broker' is missing", ""),
        ("[broker]\nurl = 7", r"\[broker\]: url must be text, not a whole number", ""),
        ('[broker]\nurl = "x"\nretries = 1.5', "retries must be a whole number, not a decimal number", ""),
        ('[broker]\nurl = "x"\nretries = true', "retries must be a whole number, not true or false", ""),
        ('[broker]\nurl = "x"\ntls = 1', "tls must be true or false, not a whole number", ""),
        ('[broker]\nurl = "x"\nca = 3', "ca must be a path", ""),
        ('names = "a"\n[broker]\nurl = "x"', "names must be a list", ""),
        ('names = [1]\n[broker]\nurl = "x"', "names must be text", ""),
        ('broker = "x"', "broker must be a table", ""),
        ("[broker", "is not TOML", ""),
    ],
)  # fmt: skip
def test_each_mistake_is_named(tmp_path, text, message, hint):
    with pytest.raises(ConfigError, match=message) as caught:
        load(tmp_path, text)
    assert hint in caught.value.hint


def test_the_environment_overrides_the_file(tmp_path):
    env = {
        "EDGEPRIV_BROKER__URL": "mqtt://other",
        "EDGEPRIV_BROKER__RETRIES": "9",
        "EDGEPRIV_BROKER__TLS": "true",
        "EDGEPRIV_ELSEWHERE__KEY": "ignored",
        "EDGEPRIV_DEMO": "ignored",
        "PATH": "/bin",
    }
    broker = load(tmp_path, GOOD, env).broker
    assert (broker.url, broker.retries, broker.tls, broker.timeout_s) == ("mqtt://other", 9, True, 2.0)
    with pytest.raises(ConfigError, match="unknown key 'retrys'"):
        load(tmp_path, GOOD, {"EDGEPRIV_BROKER__RETRYS": "9"})


def test_files_that_are_missing_or_unreadable_are_named(tmp_path):
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(MissingFileError, match=str(path)) as caught:
            read_toml(path)
        assert "--config" in caught.value.hint
    (tmp_path / "x.toml").write_bytes(b"a = '\xff\xfe'")
    with pytest.raises(ConfigError):
        read_toml(tmp_path / "x.toml")


@given(st.binary(max_size=80))
def test_any_bytes_give_settings_or_one_of_our_errors(tmp_path_factory, raw):
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(raw)
    with pytest.raises(EdgeprivError):  # no random file has the broker's url
        load_settings(Config, path, {})
