"""``edgepriv seal`` and ``edgepriv open``: one image in one file, for its recipients."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgepriv.cli import pinned_trust
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
    """Seal IMAGE for the recipients that the owner lists. The epoch's keys end with this command.

    Pixels that decoding would change (16-bit colour, CMYK, several pictures in a file) are refused: --as-is or .npy.
    """
    from edgepriv.cipher import container
    from edgepriv.cipher.epochs import DeviceEpoch
    from edgepriv.keys import full_name, load_identity

    identity, listed = load_identity(key), pinned_trust.read(trust, owner)
    picture, now = _read_image(image, as_is=as_is), time.time()
    epoch = DeviceEpoch.open(
        identity, listed, full_name("gateway", gateway), seq=int(now), now=now, profile=profile, alg=alg, max_frames=1
    )
    sealed = container.pack(epoch.signed.raw, epoch.seal(picture))
    write_out(out, sealed)
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
@click.option("--out", required=True, type=FILE, help="PNG or .npy for pixels; a JPEG's own ending.")
@_trust_options
def open_(file: Path, key: Path, out: Path, trust: Path, owner: Path, as_json: bool) -> None:
    """Open a sealed FILE with a recipient's key and write the image."""
    from edgepriv.cipher import container
    from edgepriv.cipher.cipher import FrameOpener
    from edgepriv.keys import load_identity

    check_out(out)
    identity, listed = load_identity(key), pinned_trust.read(trust, owner)
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


def write_out(path: Path, data: bytes) -> None:
    """Write a result, or say in one line why not."""
    try:
        path.write_bytes(data)
    except OSError as error:
        raise _unwritable(path, error) from None


def _unwritable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"cannot write {path}: {error.strerror}", hint="name a file in a folder that you may write to")


def check_out(path: Path) -> None:
    """Refuse a file that could not be written, before the work whose result it is to hold."""
    if not path.parent.is_dir():
        raise ConfigError(f"cannot write {path}: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"cannot write {path}: Permission denied")


def _read_image(path: Path, *, as_is: bool) -> Picture:
    from edgepriv.cipher.picture import Picture

    raw = _read(path)
    if as_is:
        return Picture.of(raw, taken=path.stat().st_mtime)
    return Picture.of(decode_pixels(raw, path), taken=path.stat().st_mtime)


def decode_pixels(raw: bytes, path: Path, *, otherwise: str = "--as-is seals the file's own bytes") -> Any:
    """Decode an image file to an array without loss: .npy as it is, all else by Pillow.

    Gray, 16-bit gray, float32 gray (TIFF), RGB and RGBA; palettes become the colours that they name.

    Raises:
        DataError: not an image, or one whose pixels the decoder would change (``otherwise``: what to do then).
    """
    import io

    import numpy as np

    if path.suffix.lower() == ".npy":
        try:
            return np.lib.format.read_array(io.BytesIO(raw), allow_pickle=False)
        except Exception as error:  # a cut or forged header ends in any of many types; to the user they are one
            raise DataError(f"{path} is not an array file") from error
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingDependencyError("decoding images needs Pillow", hint="pip install 'edgepriv[images]'") from error
    try:
        with Image.open(io.BytesIO(raw)) as image:
            if loss := _loss(image, raw):
                raise DataError(f"{path}: {loss}", hint=f"{otherwise}; pixels of any supported type may come as .npy")
            if image.mode == "F":
                return np.asarray(image, dtype=np.float32)
            if image.mode.startswith("I"):
                return np.asarray(image).astype(np.uint16)  # 16 bits, as _loss has made sure
            return np.asarray(image.convert(_mode_for(image)))
    except DataError:
        raise
    except Exception as error:  # Pillow raises many types on broken files; to the user they are one
        raise DataError(f"{path} is not an image that can be read", hint=otherwise) from error


def _mode_for(image: Any) -> str:
    """The mode that shows all there is: gray, RGB, or RGBA wherever something is transparent."""
    if "transparency" in image.info or image.mode in {"LA", "PA", "RGBA"}:
        return "RGBA"
    return "L" if image.mode in {"1", "L"} else "RGB"


def _loss(image: Any, raw: bytes) -> str:
    """Why Pillow would change these pixels or drop some, or an empty string."""
    kind, mode = image.format, image.mode
    if kind not in {"PNG", "JPEG", "MPO", "TIFF", "BMP", "GIF", "WEBP", "PPM"}:
        return f"{kind} pictures are not decoded, because they may hold more than 8 bits"
    if getattr(image, "n_frames", 1) > 1 and kind != "MPO":  # a camera's MPO: one picture and its previews
        return f"it holds {image.n_frames} pictures, of which one would be sealed"
    bits = _sample_bits(image, raw)
    sixteen_gray = bits == 16 and mode.startswith("I") and "transparency" not in image.info
    float_gray = bits == 32 and mode == "F" and image.tag_v2.get(339) == (3,)
    if bits != 8 and not sixteen_gray and not float_gray:
        return f"its samples of {bits} bits ({mode}) would be cut to 8" if bits else "its samples would be rescaled"
    if bits == 8 and mode not in {"1", "L", "LA", "P", "PA", "RGB", "RGBA"}:
        return f"its {mode} pixels would be converted to RGB"
    return ""


def _sample_bits(image: Any, raw: bytes) -> int:
    """Bits of a sample in the file: 8 stands for fewer too, which 8 bits hold; 0 where the scale is another."""
    if image.format == "PNG":
        return max(8, raw[24])
    if image.format == "TIFF":
        signed = set(image.tag_v2.get(339, (1,))) & {2, 5, 6}  # signed and complex samples have no type here
        return 0 if signed else max(8, *image.tag_v2.get(258, (1,)))
    if image.format == "PPM":
        codec, _, _, arguments = image.tile[0]
        if codec == "raw":
            return 16 if "I;16" in str(arguments) else 8
        return 8 if arguments in {("L", 255), ("RGB", 255), "1;I"} else 0
    return 8


def write_picture(picture: Picture, out: Path) -> None:
    """Write an opened picture: compressed bytes as they are, pixels as .npy or by Pillow.

    Raises:
        DataError: the file type cannot hold this picture without loss, or promises another.
        ConfigError: the file cannot be written.
    """
    import numpy as np

    ending = out.suffix.lower()
    if picture.blob is not None:
        _check_ending(picture.codec, ending, out)
        write_out(out, picture.blob)
        return
    assert picture.pixels is not None  # noqa: S101 - a picture has one of the two; tells the type checker
    if ending == ".npy":
        try:
            with out.open("wb") as file:
                np.save(file, picture.pixels, allow_pickle=False)
        except OSError as error:
            raise _unwritable(out, error) from None
        return
    if not _fits_png(picture.pixels):
        shape = "x".join(map(str, picture.pixels.shape))
        raise DataError(f"{out.name} cannot hold {shape} {picture.pixels.dtype} without loss", hint="use .npy")
    if ending != ".png":
        raise DataError(f"{out.name} cannot hold these pixels without loss", hint="use .png or .npy")
    _write_png(picture, out)


def _write_png(picture: Picture, out: Path) -> None:
    import numpy as np

    try:
        from PIL import Image
    except ImportError as error:
        raise MissingDependencyError(
            "writing PNG needs Pillow", hint="pip install 'edgepriv[images]', or --out X.npy"
        ) from error
    pixels: Any = picture.pixels
    if picture.codec == "bgr":
        pixels = pixels[:, :, ::-1]
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    try:
        Image.fromarray(np.ascontiguousarray(pixels)).save(out, format="PNG", compress_level=1)  # a third of the time
    except OSError as error:
        raise _unwritable(out, error) from None


_ENDINGS = {"jpeg": (".jpg", ".jpeg"), "png": (".png",)}
_PICTURES = {".npy", ".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp"}
_BLOB_IS_NOT = {".npy", ".png", ".jpg", ".jpeg"}  # a blob is what did not begin as these do


def _check_ending(codec: str, ending: str, out: Path) -> None:
    """Compressed bytes leave as they came, so the name of their file may not promise another kind."""
    right = _ENDINGS.get(codec, ())
    wrong = _BLOB_IS_NOT if codec == "blob" else _PICTURES
    if ending in wrong and ending not in right:
        raise DataError(
            f"what was sealed are the bytes of a {codec} file, which {out.name} would misname",
            hint=f"--out {out.with_suffix((right or ('.bin',))[0]).name}",
        )


def _fits_png(pixels: Any) -> bool:
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    return (pixels.dtype.name == "uint8" and channels in {1, 3, 4}) or (pixels.dtype.name == "uint16" and channels == 1)
