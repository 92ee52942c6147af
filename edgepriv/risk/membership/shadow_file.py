"""Shadow scores in a file, for models that were trained elsewhere.

One ``.npz`` (no pickle) with ``masks`` bool [K, n] and at least one of ``margins`` (phi, natural logarithms),
``log_probabilities`` and ``agreements``, each float [K, n]; the n records are the members in their order, then the
tested non-members in theirs: all but every third (the 3rd, 6th, ...), which the attacker knows not to be members.
``agreements`` are those of ``attacks.agreement`` on these records: its copies are the same for every model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgepriv import datasets
from edgepriv.errors import DataError, MissingFileError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

__all__ = ["read_shadow_scores"]

NAMES = ("margins", "log_probabilities", "agreements")
MAX_BYTES = 4 << 30


def read_shadow_scores(path: Path, records: int) -> dict[str, NDArray[Any]]:
    """The arrays of ``audit.TargetView`` that the file holds.

    Raises:
        MissingFileError: no such file.
        DataError: not such a file, or made for another number of records.
    """
    if not path.is_file():
        raise MissingFileError(f"no such file of shadow scores: {path}")
    if path.stat().st_size > MAX_BYTES:
        raise DataError(f"{path} is larger than {MAX_BYTES >> 30} GiB")
    arrays = datasets.read_arrays(path, ("masks", *NAMES), "an .npz of shadow scores")
    if "masks" not in arrays or len(arrays) < 2:
        raise DataError(f"{path} lacks masks or scores", hint=f"it holds 'masks' and some of {', '.join(NAMES)}")
    for name, values in arrays.items():
        if values.shape != arrays["masks"].shape or values.ndim != 2 or values.shape[1] != records:
            raise DataError(f"{path}: {name} is {values.shape}, expected [shadows, {records}] records")
        if values.dtype.kind not in ("b" if name == "masks" else "fiu"):
            raise DataError(f"{path}: {name} is {values.dtype}", hint="masks are booleans, scores are numbers")
    return {"shadow_" + name: values for name, values in arrays.items()}
