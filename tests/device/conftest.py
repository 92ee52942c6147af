"""A site in memory and one device of it, for tests of the device's own steps."""

import pytest
from device_site import World, classifier
from gateway_site import Site


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


@pytest.fixture
def world(site, tmp_path):
    made = World(site, classifier(tmp_path / "model"))
    yield made
    made.close()
