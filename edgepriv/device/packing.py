"""Deliveries as files: what the owner packs and a device unpacks, by blocks, so that models over 2 GB pass.

A delivery (format: `edgepriv.wire.delivery`) holds the protected model's files, ``golden.cbor`` (inputs with labels, or
with clean pictures for a denoiser), ``delivery.cbor`` (the issuer's signature over the digests of all of these) and the
risk service's verdicts, one for each level that was judged.
"""

from __future__ import annotations

import hashlib
import io
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import cbor2
import numpy as np

from edgepriv.errors import DataError, MissingFileError, StorageFullError, WireError
from edgepriv.files import rename, replace, sha256, sync_open
from edgepriv.image_quality import psnr
from edgepriv.selective_encryption import manifest
from edgepriv.wire import delivery

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from edgepriv.keys import Identity

SIGNED_LIST, GOLDEN = "delivery.cbor", "golden.cbor"
LIST_USE = "model-delivery"
PART = ".part"  # ends the name of a folder that is not whole
MAX_DELIVERY_BYTES = 16 << 30


@dataclass(frozen=True, slots=True)
class Limits:
    """What the self-test demands: accuracy or PSNR on the golden inputs, time and memory of one inference."""

    min_accuracy: float = 0.0
    max_latency_s: float = 60.0
    max_rss_bytes: int = 1 << 40
    min_psnr_db: float = 0.0


@dataclass(frozen=True, slots=True)
class Golden:
    """Inputs float32 [n, ...] and what is right: labels int64 [n], or clean pictures float32 [n, ...] in [0, 1]."""

    inputs: NDArray[np.float32]
    right: NDArray[Any]

    @property
    def labelled(self) -> bool:
        """Whether a classifier is judged, by accuracy; otherwise a denoiser, by PSNR."""
        return self.right.ndim == 1

    def encode(self) -> bytes:
        """For ``golden.cbor``."""
        inputs = np.ascontiguousarray(self.inputs, "<f4")
        fields: dict[str, Any] = {"inputs": inputs.tobytes(), "shape": list(inputs.shape)}
        if self.labelled:
            fields["labels"] = [int(label) for label in self.right]
        else:
            fields["targets"] = np.ascontiguousarray(self.right, "<f4").tobytes()
            fields["target_shape"] = list(self.right.shape)
        return cbor2.dumps(fields, canonical=True)

    @classmethod
    def decode(cls, raw: bytes) -> Golden:
        """Read ``golden.cbor`` (DataError: malformed)."""
        try:
            fields = cbor2.loads(raw)
            inputs = np.frombuffer(fields["inputs"], "<f4").reshape(fields["shape"])
            if "labels" in fields:
                found = cls(inputs, np.asarray(fields["labels"], np.int64))
            else:
                found = cls(inputs, np.frombuffer(fields["targets"], "<f4").reshape(fields["target_shape"]))
        except (KeyError, TypeError, ValueError, cbor2.CBORDecodeError) as error:
            raise DataError("the golden inputs are malformed") from error
        if not len(found.inputs) or len(found.inputs) != len(found.right):
            raise DataError("the golden inputs are malformed")
        return found

    def score(self, number: int, output: NDArray[Any]) -> float:
        """One output's worth: 1 or 0 for a label, dB for a picture."""
        if self.labelled:
            return float(np.argmax(output) == self.right[number])
        clean = self.right[number].reshape(-1)
        if output.size != clean.size:
            raise DataError("the model's output is not a picture of the golden size")
        return psnr(np.nan_to_num(output.reshape(1, -1)).clip(0, 1), clean.reshape(1, -1), data_range=1.0)


def write_delivery(
    stream: BinaryIO,
    files: Mapping[str, Any],
    golden: Golden,
    limits: Limits,
    issuer: Identity,
    *,
    verdicts: Mapping[str, bytes] | None = None,
) -> None:
    """Write a delivery (owner side): golden inputs, signed list and verdicts, then the bundle's public files.

    Args:
        stream: where to.
        files: bundle files by name, ``manifest.cbor`` among them: bytes, arrays of them, or a path to copy.
        golden: inputs and what is right.
        limits: what the self-test demands.
        issuer: signs the list.
        verdicts: the risk service's statements on the exact bytes, by file name (see `wire.delivery`).
    """
    content: dict[str, Any] = {GOLDEN: golden.encode(), **files}
    digests = {name: _digest(data) for name, data in content.items()}
    body = {"schema": delivery.DELIVERY, "files": digests, "limits": asdict(limits)}
    small = {SIGNED_LIST: manifest.sign_body(body, LIST_USE, issuer), **(verdicts or {})}
    delivery.write(stream, delivery.DELIVERY, {**small, **content})


def pack(
    files: Mapping[str, Any],
    golden: Golden,
    limits: Limits,
    issuer: Identity,
    *,
    verdicts: Mapping[str, bytes] | None = None,
) -> bytes:
    """As `write_delivery`, in memory."""
    stream = io.BytesIO()
    write_delivery(stream, files, golden, limits, issuer, verdicts=verdicts)
    return stream.getvalue()


def read_list(raw: bytes, issuers: Any, needed: Sequence[str]) -> dict[str, Any]:
    """Verify ``delivery.cbor``: the signed digests of the other files, and the limits.

    Raises:
        DataError: malformed, or it lacks one of the ``needed`` names.
        TrustError, AuthenticationError: not signed by an issuer.
    """
    body, _ = manifest.open_signed(raw, LIST_USE, delivery.DELIVERY, issuers)
    files, limits = body.get("files"), body.get("limits")
    names_ok = isinstance(files, dict) and all(bare(n) and isinstance(d, bytes) for n, d in files.items())
    if not names_ok or not isinstance(limits, dict) or set(limits) - set(Limits.__slots__):
        raise DataError("the delivery's signed list is malformed")
    if not set(needed) <= set(body["files"]):
        raise DataError("the delivery's signed list lacks the manifest or the golden inputs")
    return body


def unpack(path: Path, folder: Path, schema: str = delivery.DELIVERY) -> list[str]:
    """Write the files of a delivery or shipment under a new folder, each flushed to the disk; returns their names."""
    folder.mkdir(mode=0o700)
    try:
        with path.open("rb") as stream:
            found = delivery.spans(stream, schema)
            for name, span in found.items():
                if schema == delivery.DELIVERY and not bare(name):
                    raise WireError("not a model delivery: a file name is not a bare name")
                place = folder / name
                place.parent.mkdir(exist_ok=True, mode=0o700)
                with place.open("wb") as target:
                    span.copy(stream, target)
                    sync_open(target)
    except WireError as error:
        raise DataError(f"not a model delivery: {error}") from error
    return list(found)


def unpack_over(delivery: Path, place: Path, *, keep: str) -> None:
    """Unpack a delivery in the place of what an installation that was killed left there, or the disk damaged.

    Args:
        delivery: the file.
        place: the folder to make.
        keep: pattern of files that are not the delivery's and stay.

    Raises:
        StorageFullError: no room.
        DataError: not a delivery.
    """
    size = delivery.stat().st_size
    if shutil.disk_usage(place.parent).free < 2 * size:
        raise StorageFullError(f"no room to stage {size} bytes", hint="free the disk; the running model is untouched")
    part, old = place.with_name(place.name + PART), place.with_name(f"{place.name}.old{PART}")
    for folder in (part, old):
        shutil.rmtree(folder, ignore_errors=True)
    unpack(delivery, part)
    if place.is_dir():
        for path in place.glob(keep):
            replace(part / path.name, path.read_bytes())
        place.rename(old)
    rename(part, place)
    shutil.rmtree(old, ignore_errors=True)


def remove(place: Path) -> None:
    """Remove a folder of an unpacked delivery; a cut of power never leaves half of it under its own name."""
    part = place.with_name(place.name.removesuffix(PART) + PART)
    if part != place:
        shutil.rmtree(part, ignore_errors=True)
        rename(place, part)
    shutil.rmtree(part, ignore_errors=True)


def bare(name: Any) -> bool:
    """Whether a name is a file's name and nothing else."""
    return isinstance(name, str) and 0 < len(name) < 128 and "/" not in name and not name.startswith(".")


def _digest(content: Any) -> bytes:
    return file_digest(content) if isinstance(content, Path) else hashlib.sha256(memoryview(content)).digest()


def file_digest(path: Path) -> bytes:
    """SHA-256 of a file.

    Raises:
        MissingFileError: it is not there.
        DataError: larger than a delivery may be.
    """
    if not path.is_file():
        raise MissingFileError(f"no such delivery: {path}")
    if path.stat().st_size > MAX_DELIVERY_BYTES:
        raise DataError(f"{path} is larger than a delivery may be")
    return sha256(path)
