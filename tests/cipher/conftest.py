"""Both backends in turn, as the default that all code finds."""

import pytest

from edgepriv import primitives


@pytest.fixture(params=["openssl", "portable"])
def backend(request, monkeypatch):
    chosen = primitives.backend(request.param)
    monkeypatch.setattr(primitives, "_default_backend", lambda: chosen)
    return chosen
