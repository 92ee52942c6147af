"""How much of the machine the torch code may use."""

from __future__ import annotations

import torch


def use_threads(count: int) -> None:
    """Let torch use so many threads for one operation; more rarely help the small networks here."""
    torch.set_num_threads(count)
