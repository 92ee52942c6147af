"""``edgepriv seal`` and ``edgepriv open``: one image in one file, for its recipients."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgepriv.cli import trust_file
from edgepriv.errors import ConfigError, DataError, MissingDependencyError, MissingFileError

if TYPE_CHECKING:
    from edgepriv.cipher.picture import Picture

FILE = click.Path(path_type=Path, dir_okay=False)


def _trust_options(command: Any) -> Any:
    for option in (
        click.option("--json", "as_json", is_flag=True),
        click.option("--owner", required=True, type=FILE, help="The owner's public key, pinned here."),
        click.option("--trust", required=True, type=FILE, help="The owner's trust.cbor."),
    ):
        command = option(command)
    return command


@click.command("seal")
@click.argument("image", type=FILE)
@click.option("--key", required=True, type=FILE, help="The device's private key.")
@click.option("--gateway", required=True, help="Name of the gateway in the trust list.")
@click.option("--out", required=True, type=FILE, help="Sealed file: epoch record and envelope.")
@click.option("--profile", default="flep3", show_default=True, type=click.Choice(["flep3", "flep3-strong", "aead"]))
@click.option("--alg", type=click.Choice(["aes-256-gcm", "chacha20-poly1305"]), help="Forced; else what the CPU has.")
@click.option("--as-is", is_flag=True, help="Seal the file's bytes (JPEG, PNG) instead of its decoded pixels.")
@_trust_options
def seal(
    image: Path,
    key: Path,
    gateway: str,
    out: Path,
    profile: str,
    alg: Any,
    as_is: bool,
    trust: Path,
    owner: Path,
    as_json: bool,
) -> None:
    """Seal IMAGE for the recipients that the owner lists. The epoch's keys end with this command."""
    from edgepriv.cipher import container
    from edgepriv.cipher.epochs import DeviceEpoch
    from edgepriv.keys import full_name, load_identity

    identity, listed = load_identity(key), trust_file.read(trust, owner)
    picture, now = _read_image(image, as_is=as_is), time.time()
    epoch = DeviceEpoch.open(
        identity, listed, full_name("gateway", gateway), seq=int(now), now=now, profile=profile, alg=alg, max_frames=1
    )
    sealed = container.pack(epoch.signed.raw, epoch.seal(picture))
    _write(out, sealed)
    record = epoch.signed.record
    document = {
        "schema": "edgepriv.seal/1",
        "out": str(out),
        "bytes": len(sealed),
        "profile": record.profile,
        "alg": record.alg,
        "auth": record.auth,
        "recipients": len(record.stanzas),
    }
    click.echo(json.dumps(document) if as_json else f"{out}: {len(sealed)} bytes, {record.profile}, {record.alg}")


@click.command("open")
@click.argument("file", type=FILE)
@click.option("--key", required=True, type=FILE, help="The recipient's private key.")
@click.option("--out", required=True, type=FILE, help="Image to write: PNG for pixels, .npy for any type.")
@_trust_options
def open_(file: Path, key: Path, out: Path, trust: Path, owner: Path, as_json: bool) -> None:
    """Open a sealed FILE with a recipient's key and write the image."""
    from edgepriv.cipher import container
    from edgepriv.cipher.cipher import FrameOpener
    from edgepriv.keys import load_identity

    identity, listed = load_identity(key), trust_file.read(trust, owner)
    record, envelope = container.unpack(_read(file))
    opener = FrameOpener(record, identity, listed)
    picture = opener.open(envelope)
    write_picture(picture, out)
    shape = list(picture.pixels.shape) if picture.pixels is not None else []
    document = {
        "schema": "edgepriv.open/1",
        "out": str(out),
        "device": opener.epoch.record.party,
        "codec": picture.codec,
        "shape": shape,
        "taken": picture.taken,
    }
    click.echo(json.dumps(document) if as_json else f"{out}: {picture.codec} from {opener.epoch.record.party}")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise MissingFileError(f"cannot read {path}: {error.strerror}") from None


def _write(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None


def _read_image(path: Path, *, as_is: bool) -> Picture:
    from edgepriv.cipher.picture import Picture

    raw = _read(path)
    if as_is:
        return Picture.of(raw, taken=path.stat().st_mtime)
    return Picture.of(decode_pixels(raw, path), taken=path.stat().st_mtime)


def decode_pixels(raw: bytes, path: Path) -> Any:
    """Decode an image file to an array: .npy as it is, all else by Pillow (gray, 16-bit gray, RGB or RGBA)."""
    import io

    import numpy as np

    try:
        if path.suffix == ".npy":
            return np.load(io.BytesIO(raw), allow_pickle=False)
        from PIL import Image
    except ImportError as error:
        raise MissingDependencyError("decoding images needs Pillow", hint="pip install 'edgepriv[images]'") from error
    except (ValueError, EOFError) as error:
        raise DataError(f"{path} is not an array file") from error
    try:
        with Image.open(io.BytesIO(raw)) as image:
            if image.mode.startswith("I;16"):
                return np.asarray(image, dtype=np.uint16)
            keep = image.mode if image.mode in {"L", "RGB", "RGBA"} else _mode_for(image)
            return np.asarray(image.convert(keep))
    except Exception as error:  # Pillow raises many types on broken files; to the user they are one
        raise DataError(f"{path} is not an image that can be read", hint="--as-is seals any file's bytes") from error


def _mode_for(image: Any) -> str:
    if image.mode in {"1", "LA"}:
        return "L" if image.mode == "1" else "RGBA"
    return "RGBA" if "transparency" in image.info else "RGB"


def write_picture(picture: Picture, out: Path) -> None:
    """Write an opened picture: compressed bytes as they are, pixels as .npy or by Pillow.

    Raises:
        DataError: the file type cannot hold these pixels without loss.
    """
    import numpy as np

    if picture.blob is not None:
        _write(out, picture.blob)
        return
    assert picture.pixels is not None  # noqa: S101 - a picture has one of the two; tells the type checker
    if out.suffix == ".npy":
        with out.open("wb") as file:
            np.save(file, picture.pixels, allow_pickle=False)
        return
    if out.suffix != ".png" or not _fits_png(picture.pixels):
        raise DataError(f"{out.name} cannot hold these pixels without loss", hint="use .png, or .npy for any type")
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingDependencyError(
            "writing PNG needs Pillow", hint="pip install 'edgepriv[images]', or --out X.npy"
        ) from error
    pixels = picture.pixels[:, :, ::-1] if picture.codec == "bgr" else picture.pixels
    Image.fromarray(
        np.ascontiguousarray(pixels.squeeze(-1) if pixels.shape[-1:] == (1,) and pixels.ndim == 3 else pixels)
    ).save(out)


def _fits_png(pixels: Any) -> bool:
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    return (pixels.dtype.name == "uint8" and channels in {1, 3, 4}) or (pixels.dtype.name == "uint16" and channels == 1)
