"""Key files and identities: who a party is, without letting a private key out.

Rules: an identity is an Ed25519 key (signs) and an X25519 key (keys are wrapped to it), never one key for both.
Private keys live in files that only their owner can read (0600) or in systemd credentials, and are named by path,
never by value. No private byte appears in a repr, a log line, an exception or a pickle. One HKDF label for each
use stands beside the use.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from edgepriv import files, primitives
from edgepriv.errors import ConfigError, KeyFileError, MissingFileError

ROLES = {"owner": "owner", "device": "dev", "gateway": "gateway", "risk": "risk", "recipient": "op", "issuer": "issuer"}
NAME = re.compile(r"[a-z0-9-]{1,48}")
_FIELD = re.compile(r'^([a-z0-9_]+) = "([^"\n]*)"$', re.MULTILINE)
_HEADER = "# edgepriv {kind} key, version 1"


@dataclass(frozen=True, slots=True)
class PublicIdentity:
    """What others know of a party: role, full name (``dev-cam1``) and two public keys of 32 bytes each."""

    role: str
    name: str
    ed25519: bytes
    x25519: bytes

    @property
    def key_id(self) -> bytes:
        """First 8 bytes of SHA-256 of the X25519 key: a hint for finding a stanza, not a proof."""
        import hashlib

        return hashlib.sha256(self.x25519).digest()[:8]

    def verify(self, use: str, message: primitives.Buffer, signature: bytes) -> None:
        """Check this party's signature for one use, or raise AuthenticationError."""
        primitives.verify(self.ed25519, use, message, signature)

    def to_text(self) -> str:
        """The public key file."""
        return (
            f"{_HEADER.format(kind='public')}\n"
            f'role = "{self.role}"\nname = "{self.name}"\n'
            f'ed25519 = "{_b64(self.ed25519)}"\nx25519 = "{_b64(self.x25519)}"\n'
        )


class Identity:
    """A party's private keys. Signs and unwraps; never shows what it holds."""

    __slots__ = ("_ed25519", "_x25519", "public")

    def __init__(self, role: str, name: str, ed25519: bytes, x25519: bytes) -> None:
        backend = primitives.backend()
        self._ed25519, self._x25519 = ed25519, x25519
        self.public = PublicIdentity(role, name, backend.ed25519_public(ed25519), backend.x25519_public(x25519))

    @classmethod
    def new(cls, role: str, name: str) -> Identity:
        """Make fresh keys for ``name`` (without its prefix: a device ``cam1`` becomes ``dev-cam1``)."""
        return cls(role, full_name(role, name), primitives.random_bytes(32), primitives.random_bytes(32))

    @property
    def name(self) -> str:
        """The full name."""
        return self.public.name

    def sign(self, use: str, message: primitives.Buffer) -> bytes:
        """Sign for one use (64 bytes)."""
        return primitives.sign(self._ed25519, use, message)

    def unwrap(self, sealed: bytes, info: bytes) -> bytes:
        """Open an HPKE stanza addressed to this party, or raise AuthenticationError."""
        return primitives.hpke_open(self._x25519, sealed, info)

    def agree(self, public: bytes) -> bytes:
        """X25519 shared secret with another public key; feed it to HKDF only."""
        return primitives.backend().x25519(self._x25519, public)

    def save(self, path: Path) -> None:
        """Write ``path`` (0600) and ``path.pub``; never overwrites a key.

        Raises:
            KeyFileError: the file exists.
        """
        text = (
            f"{_HEADER.format(kind='PRIVATE')}: keep it secret, mode 0600\n"
            f'role = "{self.public.role}"\nname = "{self.public.name}"\n'
            f'ed25519_private = "{_b64(self._ed25519)}"\nx25519_private = "{_b64(self._x25519)}"\n'
        )
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError as error:
            raise KeyFileError(f"{path} exists", hint="choose another name; keys are never overwritten") from error
        except OSError as error:
            raise KeyFileError(f"cannot write {path}: {error.strerror}") from error
        with os.fdopen(fd, "w") as file:
            file.write(text)
            files.sync_open(file)
        public_path(path).write_text(self.public.to_text())

    def __repr__(self) -> str:
        return f"Identity({self.public.name!r}, private keys hidden)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a private key is not pickled; pass the path of its file")


def full_name(role: str, name: str) -> str:
    """Prefix a name by its role and check it: ``device, cam1 -> dev-cam1``.

    Raises:
        ConfigError: unknown role, or a name outside ``[a-z0-9-]{1,48}``.
    """
    if role not in ROLES:
        raise ConfigError(f"unknown role {role!r}", hint=f"use one of {', '.join(ROLES)}")
    prefix = ROLES[role]
    if not NAME.fullmatch(name):
        raise ConfigError(f"{name!r} is not a name", hint="1 to 48 of a-z, 0-9 and -")
    return name if role == "owner" or name.startswith(prefix + "-") else f"{prefix}-{name}"


def check_full_name(role: str, name: str) -> None:
    """Refuse what is no full name of a role: names stand in topics, on pages and in terminals (KeyFileError)."""
    prefix = ROLES.get(role, "")
    bare = name if role == "owner" else name.removeprefix(prefix + "-")
    if not prefix or not NAME.fullmatch(bare) or (role != "owner" and bare == name):
        raise KeyFileError(f"{name[:60]!r} is no name of a {role[:20]!r}", hint="1 to 48 of a-z, 0-9 and -, prefixed")


def public_path(path: Path) -> Path:
    """Where the public half of a key file lies."""
    return path.with_name(path.name + ".pub")


def load_identity(path: Path) -> Identity:
    """Read a private key file.

    Raises:
        MissingFileError: it does not exist.
        KeyFileError: malformed, or readable by others.
    """
    fields = _fields(path, private=True)
    try:
        check_full_name(fields["role"], fields["name"])
        return Identity(
            fields["role"], fields["name"], _unb64(fields["ed25519_private"]), _unb64(fields["x25519_private"])
        )
    except (KeyError, ValueError, binascii.Error):
        raise KeyFileError(f"{path} is not an edgepriv private key", hint="make one: edgepriv keys new") from None


def load_public(path: Path) -> PublicIdentity:
    """Read a public key file; accepts the private file's path too and then reads the file beside it."""
    if path.suffix != ".pub" and public_path(path).is_file():
        path = public_path(path)
    fields = _fields(path, private=False)
    try:
        check_full_name(fields["role"], fields["name"])
        return PublicIdentity(fields["role"], fields["name"], _unb64(fields["ed25519"]), _unb64(fields["x25519"]))
    except (KeyError, ValueError, binascii.Error):
        raise KeyFileError(f"{path} is not an edgepriv public key", hint="it ends in .pub") from None


def _fields(path: Path, *, private: bool) -> dict[str, str]:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read(4096).decode("ascii", "replace")
    except FileNotFoundError:
        made = (
            "edgepriv keys new makes one, edgepriv enroll a device's"
            if private
            else "a .pub file comes by hand from whose it is"
        )
        raise MissingFileError(f"no such key file: {path}", hint=f"{made}; or name the right path") from None
    except OSError as error:
        raise KeyFileError(f"cannot read key file {path}: {error.strerror}") from None
    if private and "ed25519_private" not in text and 'ed25519 = "' in text:
        raise KeyFileError(f"{path} is a public key", hint="give the private file, which lies beside it without .pub")
    if private and mode & (stat.S_IRWXG | stat.S_IRWXO) and not _is_credential(path):
        raise KeyFileError(
            f"{path} can be read by others (mode {stat.S_IMODE(mode):04o})", hint=f"chmod 600 {path}, or make a new key"
        )
    return dict(_FIELD.findall(text))


def _is_credential(path: Path) -> bool:
    """Say whether systemd placed the file (its credentials are 0440 in a folder that only the unit sees)."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    return bool(folder) and Path(folder or "/").resolve() in path.resolve().parents


def _b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _unb64(text: str) -> bytes:
    raw = base64.b64decode(text, validate=True)
    if len(raw) != primitives.KEY_BYTES:
        raise ValueError("a key has 32 bytes")
    return raw
