"""The directory that leaves the site: ``release.npz`` (images, labels), ``card.json``, ``card.html``, maybe the VAE.

``edgepriv.datasets.load`` reads such a directory as any other data set, so a device can train on it and the risk
service can probe with it. ``vae.safetensors`` travels only when it may: never when it saw the private records
without DP-SGD. Files are written beside the directory and moved into place, so a cut run leaves no half release.
"""

from __future__ import annotations

import json
import math
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv.errors import ConfigError, DataError, MissingFileError
from edgepriv.synthesis.card import SCHEMA, ReleaseCard, render_html

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from edgepriv.synthesis.generator import Mechanism
    from edgepriv.synthesis.vae import Vae

    Images = NDArray[np.uint8]
    Labels = NDArray[np.int64]

__all__ = ["mechanism_of", "read_card", "shadow_releases", "write_release"]


def write_release(
    out: Path,
    images: Images,
    labels: Labels,
    card: ReleaseCard,
    pictures: dict[str, bytes],
    vae: Vae | None = None,
) -> None:
    """Write a release to the new directory ``out``.

    Raises:
        ConfigError: ``out`` exists and is not empty, or a VAE that must stay was given.
    """
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty", hint="a release is never overwritten: name a new directory")
    if vae is not None and card.vae_trained_on == "private":
        raise ConfigError("a VAE that saw the private records without DP-SGD stays where it is")
    partial = out.with_name(out.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    np.savez_compressed(partial / "release.npz", images=images, labels=labels)
    (partial / "card.json").write_text(json.dumps(card.as_json(), indent=2) + "\n", encoding="utf-8")
    (partial / "card.html").write_text(render_html(card, pictures), encoding="utf-8")
    if vae is not None:
        from edgepriv.synthesis.training import save_vae

        save_vae(partial / "vae.safetensors", vae)
    if out.exists():
        out.rmdir()
    partial.replace(out)


def read_card(release: Path) -> dict[str, Any]:
    """The card of a release directory.

    Raises:
        MissingFileError: no card there.
        DataError: not a card of this schema.
    """
    path = release / "card.json"
    if not release.exists():
        raise MissingFileError(f"no such release: {release}")
    if not path.is_file():
        raise MissingFileError(f"{release} is not a release: it has no card.json")
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON") from error
    if not isinstance(card, dict) or card.get("schema") != SCHEMA:
        raise DataError(f"{path} is not a release card ({SCHEMA})")
    return card


def mechanism_of(card: dict[str, Any]) -> Mechanism:
    """The mechanism that a card describes.

    Raises:
        DataError: the card lacks a figure.
    """
    from edgepriv.synthesis.generator import Mechanism

    try:
        kind, _, label_epsilon = str(card["labels"]).partition(":")
        unbounded = math.inf if card["mode"] == "unsafe_no_noise" else 0.0
        return Mechanism(
            mode=card["mode"],
            epsilon=unbounded if card["epsilon_metric"] is None else float(card["epsilon_metric"]),
            clip_radius=float(card["clip_radius"]),
            latent_rms=float(card["latent_rms"]),
            copies=int(card["copies"]),
            label_epsilon=float(label_epsilon) if kind != "exact" else None,
            extra=int(card["extra"]),
            classes=int(card["classes"]) if kind != "exact" else 0,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"the release card lacks or garbles {error}") from error


def shadow_releases(
    release: Path, images: Images, labels: Labels, masks: NDArray[np.bool_], seed: int
) -> Iterator[tuple[Images, Labels]] | None:
    """Repeat a release for each membership mask [K, n] of the records, by the VAE that lies beside it.

    None where the VAE did not travel: then only its maker can calibrate an attack.
    """
    path = release / "vae.safetensors"
    mechanism = mechanism_of(read_card(release))
    if not path.is_file():
        return None
    from edgepriv.synthesis.generator import synthesize
    from edgepriv.synthesis.training import load_vae

    vae = load_vae(path)
    return (
        synthesize(vae, images[mask], labels[mask], mechanism, np.random.default_rng(seed + k))
        for k, mask in enumerate(masks)
    )
