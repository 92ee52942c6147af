"""How long tests wait for other processes: patience for a busy machine, never a measurement."""

from __future__ import annotations

import time

PATIENCE = 4.0  # what a test asks for is what an idle machine needs
POLL_S = 0.03


def wait_for(condition, seconds, text):
    """Wait until ``condition()`` is true; AssertionError with ``text`` when patience ends."""
    deadline = time.monotonic() + PATIENCE * seconds
    while not condition():
        assert time.monotonic() < deadline, text
        time.sleep(POLL_S)
