"""How many uploads a device may have open, and what becomes of those that it lets go of."""

from __future__ import annotations

from gateway_site import Device, Site, exchange, frame_digest

from gateway.transfers import STALLED_S


def test_uploads_that_a_device_let_go_of_give_way_to_those_that_it_offers_now(tmp_path):
    site = Site(tmp_path, ingest={"max_transfers_per_device": 2})
    gateway, device = site.gateway(), Device(site)
    exchange(gateway, device, device.record())
    left, now = ([device.frame(side=90, value=v) for v in r] for r in (range(2), range(2, 4)))
    for raw in left:
        gateway.link.inbox.append(device.seal(device.offer(raw)))
        gateway.step()
        gateway.link.sent.clear()  # granted, and never answered: the process is gone
    offers = [device.offer(raw) for raw in now]
    exchange(gateway, device, *map(device.seal, offers))
    assert len(gateway.transfers) == 2
    assert not {frame_digest(raw) for raw in now} & device.acks.keys(), "the places are taken, for a while"
    site.now += STALLED_S + 1
    exchange(gateway, device, *map(device.seal, offers))
    assert {device.acks[frame_digest(raw)].outcome for raw in now} == {"stored"}
    for raw in left:  # and what was let go of is taken when it is offered anew
        exchange(gateway, device, device.seal(device.offer(raw)))
        assert device.acks[frame_digest(raw)].outcome == "stored"
    assert len(gateway.transfers) == 0
    site.close()
