"""The risk service and recipients take the owner's newer list from the real gateway, and nothing that it makes up."""

from __future__ import annotations

import dataclasses
import time

import pytest
from gateway_site import Broker, GatewayProcess, Site

from edgepriv.cli.pinned_trust import adopt_newer
from edgepriv.client import GatewayClient
from edgepriv.keys import Identity
from edgepriv.trust_file import TrustFile
from edgepriv.wire.trust import sign_trust

pytestmark = pytest.mark.system


@pytest.fixture
def site(tmp_path):
    made = Site(tmp_path)
    made.own = tmp_path / "lab-trust.cbor"
    made.own.write_bytes((tmp_path / "trust.cbor").read_bytes())
    made.write_trust()
    made.broker, made.daemon = Broker(tmp_path, made.port), GatewayProcess(made)
    yield made
    assert made.daemon.stop() == 0
    made.broker.close()


@pytest.mark.parametrize("who", ["risk-lab", "op-alice"])
def test_the_newer_list_is_adopted_once_and_kept(site, who):
    trust = TrustFile(site.own, site.folder / "owner.key.pub", site.folder / f"{who}.version", clock=time.time)
    with GatewayClient(f"mqtt://127.0.0.1:{site.port}", site.keys[who], trust.current(), "gateway-main") as client:
        assert adopt_newer(client, trust)
        assert trust.current().version == 2
        assert not adopt_newer(client, trust)
    again = TrustFile(site.own, site.folder / "owner.key.pub", site.folder / f"{who}.version", clock=time.time)
    assert again.current().version == 2


class Lying:
    """What a gateway says it has, and what it sends."""

    def __init__(self, raw):
        self.raw = raw

    def trust_above(self, _version):
        return self.raw


def test_a_list_that_the_owner_did_not_sign_is_refused(tmp_path):
    site = Site(tmp_path)
    site.own = tmp_path / "lab-trust.cbor"
    site.own.write_bytes((tmp_path / "trust.cbor").read_bytes())
    trust = TrustFile(site.own, site.folder / "owner.key.pub", site.folder / "seen", clock=time.time)
    forged = sign_trust(dataclasses.replace(site.trust_list(), version=9), Identity.new("owner", "owner"))
    for raw in (forged, b"rubbish", site.own.read_bytes()):
        assert not adopt_newer(Lying(raw), trust)
        assert trust.current().version == 1
