"""The signed papers of a protected model: its manifest and the permissions to open it.

A signed object is the CBOR array ``[body bytes, issuer's Ed25519 key, signature]``. Signature, HPKE info and all
hashes use the *received* body bytes, never a re-encoding; a body that is not deterministic CBOR is refused. The
issuer must be among the keys that the reader has pinned; the key inside the object only says which one to try.

Rules: a permission is believed only after its signature, model id, version, carrier digest, device and expiry were
checked, in that order, before anything is unwrapped. No clock of its own: ``now_s`` is an argument.
"""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import cbor2

from edgepriv import primitives
from edgepriv.errors import DataError, TrustError
from edgepriv.selective_encryption.levels import MAX_LEVELS, MAX_REGIONS, Binding, Region

if TYPE_CHECKING:
    from collections.abc import Collection

    from edgepriv.keys import Identity, PublicIdentity

SCHEMA = "edgepriv.protected-model/1"
PERMISSION_SCHEMA = "edgepriv.permission/1"
MAX_SIGNED_BYTES = 16_000_000
MODES = ("levels", "full", "both")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of the bundle: bare name, size and SHA-256 of its clear content (or of a segment as stored)."""

    name: str
    size: int
    sha256: bytes


@dataclass(frozen=True, slots=True)
class Level:
    """One service level: what it promises, and the digest of the model after levels 1..m were written back."""

    level: int
    target: float | None
    accuracy: float | None
    share: float
    units: int
    segment: FileEntry
    digest: bytes


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything public about a protected model, signed by its issuer.

    ``files`` names the graph first, then external-data files. With mode ``full`` or ``both`` they are stored sealed
    under their name + ``.sealed``. ``regions`` are the weights that segments may touch; the *positions* are not here.
    """

    name: str
    binding: Binding
    mode: str
    files: tuple[FileEntry, ...]
    regions: tuple[Region, ...]
    levels: tuple[Level, ...]
    issued_s: int
    trainable: tuple[str, ...] = ()
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def sealed(self) -> bool:
        """Say whether the carrier itself is stored as ciphertext."""
        return self.mode != "levels"

    def stored_name(self, entry: FileEntry) -> str:
        """File name in the bundle."""
        return entry.name + ".sealed" if self.sealed else entry.name

    def level(self, number: int) -> Level:
        """Look a level up.

        Raises:
            TrustError: the model has no such level.
        """
        if not 1 <= number <= len(self.levels):
            raise TrustError(f"the model has levels 1 to {len(self.levels)}, not {number}")
        return self.levels[number - 1]


@dataclass(frozen=True, slots=True)
class Permission:
    """The right of one device to open one model up to one level until a date."""

    binding: Binding
    level: int
    device: bytes
    issued_s: int
    expires_s: int
    wrapped: bytes


def encode_manifest(manifest: Manifest, issuer: Identity) -> bytes:
    """Sign a manifest."""
    body = {
        "schema": SCHEMA,
        "name": manifest.name,
        **_binding_fields(manifest.binding),
        "mode": manifest.mode,
        "files": [[f.name, f.size, f.sha256] for f in manifest.files],
        "regions": [[r.file, r.offset, r.unit_bytes, r.units] for r in manifest.regions],
        "levels": [_level_fields(level) for level in manifest.levels],
        "issued": manifest.issued_s,
        "trainable": list(manifest.trainable),
        "about": manifest.about,
    }
    return sign_body(body, "model-manifest", issuer)


def decode_manifest(signed: bytes, issuers: Collection[bytes]) -> Manifest:
    """Verify and read a manifest.

    Raises:
        DataError: not a manifest.
        TrustError: signed by nobody who is pinned.
        AuthenticationError: altered.
    """
    body, _ = open_signed(signed, "model-manifest", SCHEMA, issuers)
    try:
        return _manifest(body)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise DataError("the model's manifest is malformed") from error


def _manifest(body: dict[str, Any]) -> Manifest:
    levels = tuple(_level(number, item) for number, item in enumerate(body["levels"], 1))
    regions = tuple(Region(*(_count(value) for value in item)) for item in body["regions"])
    files = tuple(_file(item) for item in body["files"])
    names = [entry.name for entry in (*files, *(level.segment for level in levels))]
    if not files or not levels or len(levels) > MAX_LEVELS or len(regions) > MAX_REGIONS:
        raise ValueError
    if len(set(names)) != len(names) or body["mode"] not in MODES:
        raise ValueError
    for region in regions:
        if region.unit_bytes < 1 or region.offset + region.unit_bytes * region.units > files[region.file].size:
            raise ValueError
    about = body["about"] if isinstance(body["about"], dict) else {}
    return Manifest(
        str(body["name"]),
        _binding(body),
        body["mode"],
        files,
        regions,
        levels,
        _count(body["issued"]),
        tuple(str(name) for name in body["trainable"]),
        about,
    )


def _level_fields(level: Level) -> dict[str, Any]:
    return {**asdict(level), "segment": [level.segment.name, level.segment.size, level.segment.sha256]}


def _level(number: int, item: dict[str, Any]) -> Level:
    if item["level"] != number:
        raise ValueError
    measured = [None if item[key] is None else float(item[key]) for key in ("target", "accuracy")]
    return Level(
        number,
        measured[0],
        measured[1],
        float(item["share"]),
        _count(item["units"]),
        _file(item["segment"]),
        _digest(item["digest"]),
    )


def _file(item: list[Any]) -> FileEntry:
    name, size, digest = item
    if not isinstance(name, str) or not name or "/" in name or "\\" in name or name.startswith("."):
        raise ValueError
    return FileEntry(name, _count(size), _digest(digest))


def _digest(value: Any) -> bytes:
    if not isinstance(value, bytes) or len(value) != 32:
        raise ValueError
    return value


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**53:
        raise ValueError
    return value


def _binding_fields(binding: Binding) -> dict[str, Any]:
    return {"model_id": binding.model_id, "version": binding.version, "carrier": binding.carrier}


def _binding(body: dict[str, Any]) -> Binding:
    return Binding(bytes(body["model_id"]), _count(body["version"]), _digest(body["carrier"]))


def grant(
    binding: Binding, level: int, key: bytes, device: PublicIdentity, issuer: Identity, *, now_s: int, expires_s: int
) -> bytes:
    """Make a signed permission: the level's key wrapped to one device.

    Args:
        binding: the protected model.
        level: highest level to open.
        key: the key of that level.
        device: who may open it.
        issuer: signs the permission.
        now_s: seconds since 1970.
        expires_s: seconds since 1970.

    Raises:
        TrustError: the permission would be expired at once.
    """
    if expires_s <= now_s:
        raise TrustError("the permission would already have expired", hint="choose a later --expires")
    fields = _permission_fields(binding, level, device.x25519, now_s, expires_s)
    wrapped = primitives.hpke_wrap(device.x25519, key, _hpke_info(fields))
    return sign_body({**fields, "wrapped": wrapped}, "model-permission", issuer)


def decode_permission(signed: bytes, issuers: Collection[bytes]) -> Permission:
    """Verify a permission's signature and read it; see `open_permission` for the rest of the checks."""
    body, _ = open_signed(signed, "model-permission", PERMISSION_SCHEMA, issuers)
    try:
        return Permission(
            _binding(body),
            _count(body["level"]),
            _digest(body["device"]),
            _count(body["issued"]),
            _count(body["expires"]),
            bytes(body["wrapped"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError("the permission is malformed") from error


def check_permission(permission: Permission, manifest: Manifest, device: bytes, *, now_s: int) -> None:
    """Check that a permission is for this model, this device and this time.

    Raises:
        TrustError: it is for another model, version, carrier, device or level, or it has expired.
    """
    ours, theirs = manifest.binding, permission.binding
    if theirs.model_id != ours.model_id:
        raise TrustError("the permission is for another model")
    if theirs.version != ours.version:
        raise TrustError(f"the permission is for version {theirs.version}; this is version {ours.version}")
    if theirs.carrier != ours.carrier:
        raise TrustError("the permission is for another carrier of this model")
    if permission.device != device:
        raise TrustError("the permission is for another device", hint="grant one with this device's .pub file")
    if now_s >= permission.expires_s:
        raise TrustError("the permission has expired", hint="ask the model's owner for a new one")
    manifest.level(permission.level)


def open_permission(permission: Permission, device: Identity) -> bytes:
    """Unwrap the level's key, or raise AuthenticationError. Call `check_permission` first."""
    fields = _permission_fields(
        permission.binding, permission.level, permission.device, permission.issued_s, permission.expires_s
    )
    return device.unwrap(permission.wrapped, _hpke_info(fields))


def _permission_fields(binding: Binding, level: int, device: bytes, now_s: int, expires_s: int) -> dict[str, Any]:
    return {
        "schema": PERMISSION_SCHEMA,
        **_binding_fields(binding),
        "level": level,
        "device": device,
        "issued": now_s,
        "expires": expires_s,
    }


def _hpke_info(fields: dict[str, Any]) -> bytes:
    return b"edgepriv/model-key/v1\x00" + cbor2.dumps(fields, canonical=True)


def sign_body(body: dict[str, Any], use: str, issuer: Identity) -> bytes:
    """Sign a CBOR map for one use, with the signer's public key beside it."""
    raw = cbor2.dumps(body, canonical=True)
    return cbor2.dumps([raw, issuer.public.ed25519, issuer.sign(use, raw)], canonical=True)


def open_signed(signed: bytes, use: str, schema: str, issuers: Collection[bytes]) -> tuple[dict[str, Any], bytes]:
    """Verify a signed map and its schema; returns it with the signer's key.

    Raises:
        DataError: not such an object.
        TrustError: signed by nobody who is pinned.
        AuthenticationError: altered.
    """
    raw, issuer, signature = _parts(signed, use.removeprefix("model-"))
    if issuer not in issuers:
        raise TrustError("signed by somebody who is not a pinned model issuer", hint="check --issuer or trust.cbor")
    primitives.verify(issuer, use, raw, signature)
    body = _decoded(raw, use.removeprefix("model-"))
    if not isinstance(body, dict) or body.get("schema") != schema:
        raise DataError(f"not a {schema} object", hint="is it from a newer edgepriv, or another kind of file?")
    if cbor2.dumps(body, canonical=True) != raw:
        raise DataError("the signed object is not deterministic CBOR")
    return body, issuer


def _parts(signed: bytes, what: str) -> tuple[bytes, bytes, bytes]:
    if len(signed) > MAX_SIGNED_BYTES:
        raise DataError(f"a signed {what} has at most {MAX_SIGNED_BYTES} bytes")
    parts = _decoded(signed, what)
    if not isinstance(parts, list) or len(parts) != 3 or not all(isinstance(part, bytes) for part in parts):
        raise DataError(f"not a signed {what}")
    return parts[0], parts[1], parts[2]


def _decoded(raw: bytes, what: str) -> Any:
    """Decode exactly one CBOR item; the limits of the caller bound its size."""
    stream = io.BytesIO(raw)
    try:
        item = cbor2.load(stream)
    except (cbor2.CBORDecodeError, ValueError, TypeError, OverflowError, RecursionError, MemoryError) as error:
        raise DataError(f"not a signed {what}: the CBOR is broken", hint="is it the right file?") from error
    if stream.tell() != len(raw):
        raise DataError(f"bytes follow the signed {what}")
    return item
