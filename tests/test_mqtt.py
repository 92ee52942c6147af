"""The paho link against a real mosquitto: local refusals, reconnects, back-pressure, and the 3.1.1 fallback."""

from __future__ import annotations

import os
import signal
import time

import pytest
from gateway_site import Broker, free_port
from patience import wait_for

from edgepriv.demo.processes import Children, start_broker
from edgepriv.errors import ConfigError, KeyFileError, UnavailableError
from edgepriv.mqtt import TlsFiles, open_link

pytestmark = pytest.mark.system


@pytest.fixture
def broker(tmp_path):
    made = Broker(tmp_path, free_port())
    yield made
    made.close()


@pytest.fixture
def link_to():
    made = []

    def open_one(port, name, **options):
        link = open_link(f"mqtt://127.0.0.1:{port}", name, **options)
        made.append(link)
        link.wait(60)
        return link

    yield open_one
    for link in made:
        link.close()


def received(link, count, timeout_s=40):
    got = []
    deadline = time.monotonic() + timeout_s
    while len(got) < count and time.monotonic() < deadline:
        got += link.wait_inbound(0.1)
    return got


def test_packets_arrive_in_order_with_topic_and_bytes(broker, link_to):
    reader, writer = link_to(broker.port, "reader"), link_to(broker.port, "writer")
    reader.subscribe("a/+/b")
    time.sleep(0.2)
    for i in range(50):
        wait_for(lambda i=i: writer.send(f"a/{i}/b", bytes([i])), 5, "not taken")
    got = received(reader, 50)
    assert [(p.topic, p.payload) for p in got] == [(f"a/{i}/b", bytes([i])) for i in range(50)]
    wait_for(lambda: writer.in_flight == 0, 5, "not acknowledged by the broker")


def test_a_packet_over_the_brokers_limit_is_refused_here_and_the_connection_lives(broker, link_to):
    link = link_to(broker.port, "writer")
    assert link.max_packet_bytes < 262_144
    assert not link.send("a", bytes(link.max_packet_bytes + 1))
    assert link.send("a", bytes(link.max_packet_bytes))
    wait_for(lambda: link.in_flight == 0, 5, "the largest packet was not taken")
    assert (link.connected, link.generation) == (True, 1)


def test_the_own_limit_holds_where_the_broker_allows_more(broker, link_to):
    link = link_to(broker.port, "writer", max_packet_bytes=1000)
    assert link.max_packet_bytes == 1000
    assert not link.send("a", bytes(1001))


def test_it_reconnects_subscribes_again_and_counts_the_connections(broker, link_to):
    reader, writer = link_to(broker.port, "reader"), link_to(broker.port, "writer")
    reader.subscribe("x")
    broker.kill()
    wait_for(lambda: not reader.connected and not writer.connected, 10, "the loss was not noticed")
    assert not writer.send("x", b"lost")
    broker.start()
    wait_for(lambda: reader.generation == 2 and writer.generation == 2, 20, "no reconnect")
    time.sleep(0.2)
    assert writer.send("x", b"after")
    assert [p.payload for p in received(reader, 1)] == [b"after"]


def test_the_window_of_unacknowledged_packets_is_bounded(broker, link_to):
    link = link_to(broker.port, "writer", inflight=5)
    os.kill(broker.process.pid, signal.SIGSTOP)
    try:
        taken = sum(link.send("a", b"x") for _ in range(50))
    finally:
        os.kill(broker.process.pid, signal.SIGCONT)
    assert taken == 5
    wait_for(lambda: link.in_flight == 0, 10, "the window did not empty")
    assert link.send("a", b"x")


def test_a_full_inbox_holds_the_network_back_and_loses_nothing(broker, link_to):
    reader = link_to(broker.port, "reader", inbox=10)
    writer = link_to(broker.port, "writer")
    reader.subscribe("a")
    time.sleep(0.2)
    for i in range(200):
        wait_for(lambda i=i: writer.send("a", i.to_bytes(2, "big")), 5, "not taken")
    time.sleep(0.3)
    assert reader._inbox.qsize() == 10
    assert [int.from_bytes(p.payload, "big") for p in received(reader, 200)] == list(range(200))


def test_a_will_is_published_when_the_party_vanishes(broker, link_to):
    reader = link_to(broker.port, "reader")
    reader.subscribe("will")
    link_to(broker.port, "victim", will=("will", b"gone"))
    time.sleep(0.2)
    link_to(broker.port, "victim")  # the same id: the broker throws the first one out
    assert [p.payload for p in received(reader, 1)] == [b"gone"]


def test_a_broker_that_is_away_is_unavailable_and_nothing_blocks():
    link = open_link(f"mqtt://127.0.0.1:{free_port()}", "x")
    assert not link.send("a", b"x")
    assert link.receive() == []
    with pytest.raises(UnavailableError) as caught:
        link.wait(0.3)
    assert caught.value.hint
    link.close()


@pytest.mark.parametrize("url", ["http://h", "mqtt://", "h:1883", "mqtt://h:port", "mqtts://h"])
def test_a_url_that_is_not_understood_is_a_configuration_error(url):
    with pytest.raises(ConfigError):
        open_link(url, "x")


def test_a_missing_ca_file_is_an_error_before_anything_is_sent(tmp_path):
    with pytest.raises(KeyFileError, match=r"none\.pem"):
        open_link("mqtts://127.0.0.1:1", "x", tls=TlsFiles(tmp_path / "none.pem"))
    (tmp_path / "rubbish.pem").write_text("no certificate")
    with pytest.raises(KeyFileError, match="cannot use the TLS files"):
        open_link("mqtts://127.0.0.1:1", "x", tls=TlsFiles(tmp_path / "rubbish.pem"))


def test_it_falls_back_to_mqtt_3_1_1_with_amqtt(tmp_path, link_to):
    pytest.importorskip("amqtt")
    with Children(tmp_path) as children:
        url, name = start_broker(children, "amqtt")
        assert "3.1.1" in name
        port = int(url.rsplit(":", 1)[1])
        reader, writer = link_to(port, "reader"), link_to(port, "writer")
        reader.subscribe("a/#")
        time.sleep(0.3)
        for i in range(20):
            wait_for(lambda i=i: writer.send("a/b", bytes([i])), 5, "not taken")
        assert {p.payload[0] for p in received(reader, 20)} == set(range(20))
