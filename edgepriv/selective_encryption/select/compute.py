"""Where torch computes here: threads and device of this process, chosen once by the command."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from edgepriv.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_chosen = {"device": torch.device("cpu")}


def use(threads: int = 1, device: str = "cpu") -> None:
    """Bound the threads and choose the device, for example ``cuda`` for networks at full size.

    Raises:
        ConfigError: this torch knows no such device, or it is not there.
    """
    torch.set_num_threads(threads)
    try:
        _chosen["device"] = torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError) as error:
        text = str(error).splitlines()[0][:200]
        raise ConfigError(
            f"torch cannot compute on {device!r}: {text}", hint="--device cpu, or cuda with a GPU"
        ) from error


def device() -> torch.device:
    """The chosen device."""
    return _chosen["device"]


def tensor(values: NDArray[Any]) -> torch.Tensor:
    """An array on the device; pictures in the memory format that convolutions like."""
    found = torch.from_numpy(np.ascontiguousarray(values)).to(device())
    return found.contiguous(memory_format=torch.channels_last) if found.ndim == 4 else found
