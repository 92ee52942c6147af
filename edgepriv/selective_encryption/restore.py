"""Open a protected model on a device: numpy only, in memory, checked before any session exists.

Order: the manifest's and the permission's signatures, the permission's fields, the HPKE unwrap, the AEAD of each
segment, the patch, and at last the digest of the very bytes that the session will get against the signed one. Any
failure raises before a model is returned, so no session can start on decoys by mistake.

Rules: true weights never touch the disk: files are patched in memory. `SessionOptions.add_initializer` is never
used, because ONNX Runtime may fold the file's own bytes first and silently run the masked model. Root on the device
can read the weights from memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv.errors import AuthenticationError, DataError, TrustError
from edgepriv.selective_encryption import levels, manifest, onnx_bytes

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from numpy.typing import NDArray

    from edgepriv.keys import Identity

_NUMPY_TYPES = {1: "<f4", 2: "u1", 3: "i1", 4: "<u2", 5: "<i2", 6: "<i4", 7: "<i8", 9: "?", 10: "<f2", 11: "<f8"}


@dataclass(slots=True)
class Restored:
    """A model opened up to ``level``, in memory only; call `wipe` when the session exists.

    ``expires_s`` and ``issued_s``: until when it may run, and the latest time that its signed papers state.
    """

    level: int
    digest: bytes
    expires_s: int
    names: tuple[str, ...]
    files: list[NDArray[np.uint8]]
    issued_s: int = 0

    def model_bytes(self) -> bytes:
        """The graph's bytes, for ``InferenceSession``; see `feed` for a model with external data."""
        return self.files[0].tobytes()

    def feed(self, options: Any, ort: Any) -> bytes:
        """Hand external initializers to ``options`` and return the bytes for ``ort.InferenceSession``.

        Args:
            options: an ``ort.SessionOptions``.
            ort: the ``onnxruntime`` module (this package does not import it).

        Raises:
            DataError: an external initializer has an element type that cannot be handed over.
        """
        if len(self.files) > 1:
            tensors = dict(self._external())
            values = [ort.OrtValue.ortvalue_from_numpy(tensor) for tensor in tensors.values()]
            options.add_external_initializers(list(tensors), values)
        return self.model_bytes()

    def session(self, ort: Any, options: Any = None, **kwargs: Any) -> Any:
        """Start an ``ort.InferenceSession`` on the restored model and wipe our own copy of the weights."""
        options = options if options is not None else ort.SessionOptions()
        try:
            return ort.InferenceSession(self.feed(options, ort), options, **kwargs)
        finally:
            self.wipe()

    def _external(self) -> list[tuple[str, NDArray[Any]]]:
        by_name = dict(zip(self.names[1:], self.files[1:], strict=True))
        tensors = []
        for item in onnx_bytes.parse(self.files[0].data).initializers:
            if item.location:
                if item.data_type not in _NUMPY_TYPES:
                    raise DataError(f"external weight {item.name!r} has an element type that is not supported")
                raw = _part(by_name, item)
                array = np.require(raw.view(_NUMPY_TYPES[item.data_type]), requirements=["A"])
                tensors.append((item.name, array.reshape(item.dims)))
        return tensors

    def wipe(self) -> None:
        """Overwrite our copy of the weights. Copies inside the runtime cannot be reached."""
        for content in self.files:
            if content.flags.writeable:
                content.fill(0)


def _part(files: Mapping[str, NDArray[np.uint8]], item: onnx_bytes.Initializer) -> NDArray[np.uint8]:
    content = files.get(item.location)
    if content is None or item.offset + item.length > len(content):
        raise DataError(f"external data of {item.name!r} lies outside the signed files")
    return np.asarray(content[item.offset : item.offset + item.length])


def open_level(
    signed_manifest: bytes,
    signed_permission: bytes,
    stored: Mapping[str, Any],
    device: Identity,
    issuers: Collection[bytes],
    *,
    now_s: int,
    level: int | None = None,
) -> Restored:
    """Open a protected model with a permission.

    Args:
        signed_manifest: the bundle's manifest.
        signed_permission: a permission for this device.
        stored: bundle file name -> content; the carrier's files as writable uint8 arrays are patched in place
            (``bytes`` are copied first), segments as bytes.
        device: the device's private identity.
        issuers: Ed25519 keys whose signature is believed.
        now_s: seconds since 1970; a device passes its persisted time floor.
        level: open less than the permission allows.

    Raises:
        TrustError, AuthenticationError, DataError: see the module; nothing is returned then.
    """
    paper = manifest.decode_manifest(signed_manifest, issuers)
    permission = manifest.decode_permission(signed_permission, issuers)
    manifest.check_permission(permission, paper, device.public.x25519, now_s=now_s)
    wanted = permission.level if level is None else level
    if not 1 <= wanted <= permission.level:
        raise TrustError(f"the permission opens levels 1 to {permission.level}, not {wanted}")
    key = manifest.open_permission(permission, device)
    key = levels.key_at(key, paper.binding.model_id, permission.level, wanted)
    opened = open_with_key(paper, key, wanted, stored, expires_s=permission.expires_s)
    opened.issued_s = max(paper.issued_s, permission.issued_s)
    return opened


def open_with_key(
    paper: manifest.Manifest, key: bytes, level: int, stored: Mapping[str, Any], *, expires_s: int = 0
) -> Restored:
    """Open a verified manifest's model with a level's key (the owner holds it; a device unwraps it)."""
    files = _carrier(paper, key, level, stored)
    _check_regions(paper, files[0])
    for number in range(1, level + 1):
        entry = paper.level(number)
        sealed = _stored(stored, entry.segment.name)
        segment_key = levels.key_at(key, paper.binding.model_id, level, number)
        try:
            plain = levels.unseal(segment_key, paper.binding, number, sealed)
        except AuthenticationError as error:
            raise _altered(entry.segment.name) from error
        levels.apply_segment(files, paper.regions, plain)
    digest = levels.model_digest(files)
    if digest != paper.level(level).digest:
        raise AuthenticationError("the restored model is not the one that was signed", hint="fetch the model again")
    names = tuple(entry.name for entry in paper.files)
    return Restored(level, digest, expires_s, names, files)


def open_carrier(paper: manifest.Manifest, stored: Mapping[str, Any], key: bytes | None = None) -> Restored:
    """Read the carrier as it is, decoys included (level 0), for measuring what everybody can have.

    Args:
        paper: the verified manifest.
        stored: the bundle's files.
        key: the owner's key of the top level, for a carrier that is itself sealed.

    Raises:
        TrustError: the carrier is sealed and no key was given.
    """
    if paper.sealed and key is None:
        raise TrustError("the carrier is sealed: level 0 does not exist in this mode")
    files = _carrier(paper, key or b"", len(paper.levels), stored)
    digest = levels.model_digest(files)
    if digest != paper.binding.carrier:
        raise AuthenticationError("the carrier is not the one that was signed", hint="fetch the model again")
    return Restored(0, digest, 0, tuple(entry.name for entry in paper.files), files)


def _carrier(paper: manifest.Manifest, key: bytes, level: int, stored: Mapping[str, Any]) -> list[NDArray[np.uint8]]:
    files = []
    for index, entry in enumerate(paper.files):
        content = _stored(stored, paper.stored_name(entry))
        if paper.sealed:
            first = levels.key_at(key, paper.binding.model_id, level, 1)
            try:
                content = levels.unseal_file(first, paper.binding, index, content)
            except AuthenticationError as error:
                raise _altered(paper.stored_name(entry)) from error
        array = _array(content)
        if len(array) != entry.size:
            raise AuthenticationError(f"{entry.name} has not the signed size", hint="fetch the model again")
        files.append(array)
    return files


def _altered(name: str) -> AuthenticationError:
    return AuthenticationError(
        f"{name} is not authentic: it was altered, or belongs to another model or version", hint="fetch the model again"
    )


def _stored(stored: Mapping[str, Any], name: str) -> Any:
    if name not in stored:
        raise DataError(f"the bundle lacks {name}", hint="fetch the model again")
    return stored[name]


def _array(content: Any) -> NDArray[np.uint8]:
    if isinstance(content, np.ndarray) and content.flags.writeable and content.dtype == np.uint8:
        return np.asarray(content)
    array = np.frombuffer(content, np.uint8)
    return array if array.flags.writeable else array.copy()


def _check_regions(paper: manifest.Manifest, graph_bytes: NDArray[np.uint8]) -> None:
    """Check that each region lies inside one initializer's own bytes, and that no foreign code is named.

    The digest at the end would catch a stray write too; this catches it before anything is written.
    """
    graph = onnx_bytes.parse(graph_bytes.data)
    onnx_bytes.check_domains(graph)
    names = {"": 0, **{entry.name: index for index, entry in enumerate(paper.files) if index}}
    spans = {(names.get(i.location, -1), i.offset): i.length for i in graph.initializers}
    for region in paper.regions:
        if spans.get((region.file, region.offset), -1) < region.unit_bytes * region.units:
            raise DataError("the manifest names bytes that are no weight of the carrier")
