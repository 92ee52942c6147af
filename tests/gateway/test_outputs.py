"""Aggregation of released outputs, its publication, and the webhook."""

from __future__ import annotations

import hashlib
import hmac
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from gateway_site import Device, Site, exchange
from hypothesis import given
from hypothesis import strategies as st
from patience import wait_for

from edgepriv.errors import ConfigError, KeyFileError
from edgepriv.wire.output import Output
from gateway.outputs import NONE, count_output, summary
from gateway.webhook import Webhook


def output(task, policy, decimals, *values):
    return Output(
        counter=0, at=0.0, model="m", model_digest=b"", task=task, policy=policy, bits=1.0, decimals=decimals,
        scene=b"", values=tuple(values),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("released", "expected"),
    [
        (output("classify", "argmax", 0, [7, 0]), [(7, 1, 0, 0.0)]),
        (output("classify", "topk:2", 2, [1, 40], [4, 55]), [(4, 1, 1, 0.55)]),
        (output("classify", "softmax:1", 1, [0, 5], [1, 5]), [(0, 1, 1, 0.5)]),
        (output("detect", "counts", 0, [2, 3], [5, 1]), [(2, 3, 0, 0.0), (5, 1, 0, 0.0)]),
        (output("detect", "boxes:8", 0, [2, 1, 1, 2, 2], [2, 4, 4, 1, 1]), [(2, 2, 0, 0.0)]),
        (output("detect", "counts", 0), [(NONE, 1, 0, 0.0)]),
        (output("regress", "steps:0.5", 0, [0, 7]), [(0, 1, 1, 3.5)]),
    ],
)
def test_each_task_counts_as_documented(released, expected):
    assert [(c.label, c.count, c.scored, c.score_sum) for c in count_output(released)] == expected


@given(
    st.sampled_from(["classify", "detect", "regress", "other"]),
    st.text(max_size=9),
    st.integers(0, 9),
    st.lists(st.lists(st.integers(-(1 << 39), 1 << 39), min_size=1, max_size=6), max_size=5),
)
def test_any_checked_output_counts_without_an_error(task, policy, decimals, values):
    for counted in count_output(output(task, policy, decimals, *values)):
        assert counted.count >= 0


@pytest.fixture
def site(tmp_path):
    made = Site(tmp_path)
    yield made
    made.close()


def test_windows_sum_count_mean_rate_and_bits_and_are_published_again_when_late_ones_come(site):
    gateway, device = site.gateway(), Device(site)
    start = int(site.now // 10) * 10
    exchange(gateway, device, device.record())
    packets = [
        device.seal(device.output(policy="topk:1", decimals=2, values=[[3, score]], at=start + i))
        for i, score in enumerate((50, 100))
    ]
    exchange(gateway, device, *packets, device.seal(device.output(label=1, at=start + 3)))
    rows = summary(gateway.store.database, since=start, by=("device", "class"))
    assert rows == [
        {"device": "dev-cam1", "class": 1, "count": 1, "mean_score": None, "rate_per_s": 0.1, "bits": 3.3},
        {"device": "dev-cam1", "class": 3, "count": 2, "mean_score": 0.75, "rate_per_s": 0.2, "bits": 6.6},
    ]
    site.now = start + 30
    gateway.step()
    (packet,) = [p for p in gateway.link.sent if p.topic == "edgepriv/v1/gateway-main/out/windows"]
    document = json.loads(packet.payload)
    assert document["schema"] == "edgepriv.windows/1"
    assert [w["count"] for w in document["windows"]] == [1, 2]
    gateway.link.sent.clear()
    site.now += 10
    gateway.step()
    assert not gateway.link.sent
    exchange(gateway, device, device.seal(device.output(label=1, at=start + 4)))
    site.now += 10
    gateway.step()
    (again,) = [p for p in gateway.link.sent if p.topic.endswith("/out/windows")]
    assert [(w["class"], w["count"]) for w in json.loads(again.payload)["windows"]] == [(1, 2)]


def test_nothing_is_marked_as_published_that_the_broker_did_not_take(site):
    gateway, device = site.gateway(), Device(site)
    exchange(gateway, device, device.record(), device.seal(device.output()))
    gateway.link.refuse = True
    site.now += 60
    gateway.step()
    gateway.link.refuse = False
    site.now += 10
    gateway.step()
    assert [p for p in gateway.link.sent if p.topic.endswith("/out/windows")]


def test_long_model_names_are_published_in_packets_that_the_broker_takes(site):
    gateway, device = site.gateway(), Device(site)
    gateway.link.max_packet_bytes = 8000
    exchange(gateway, device, device.record())
    exchange(gateway, device, *[device.seal(device.output(label=i, model="m" * 3000)) for i in range(12)])
    for _ in range(20):
        site.now += 10
        gateway.step()
    packets = [p for p in gateway.link.sent if p.topic.endswith("/out/windows")]
    assert sum(len(json.loads(p.payload)["windows"]) for p in packets) == 12
    assert max(len(p.payload) for p in packets) <= 8000


def test_an_unknown_grouping_is_a_clear_error(site):
    with pytest.raises(ConfigError, match="cannot group"):
        summary(site.gateway().store.database, since=0, by=("colour",))


class Receiver:
    """An HTTP receiver that refuses the first posts."""

    def __init__(self, refuse=0, status=200):
        self.bodies, self.signatures, self.refuse = [], [], refuse
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                ok = receiver.refuse <= 0
                receiver.refuse -= 1
                if ok:
                    receiver.bodies.append(body)
                    receiver.signatures.append(self.headers.get("X-Edgepriv-Signature"))
                self.send_response(status if ok else 503)
                self.send_header("Location", "http://127.0.0.1:1/")
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


def test_a_webhook_repeats_until_it_is_taken_and_signs(tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"0123456789abcdef0123\n")
    receiver = Receiver(refuse=1)
    hook = Webhook(receiver.url, secret=secret)
    hook.put({"a": 1})
    wait_for(lambda: receiver.bodies, 5, "nothing arrived")
    hook.close()
    receiver.close()
    expected = hmac.new(b"0123456789abcdef0123", receiver.bodies[0], hashlib.sha256).hexdigest()
    assert receiver.signatures == [f"sha256={expected}"]
    assert (hook.posted, hook.failed, hook.dropped) == (1, 1, 0)


def test_a_webhook_that_nobody_hears_drops_the_oldest_and_never_blocks():
    hook = Webhook("http://127.0.0.1:1/none", queue=3)
    for index in range(10):
        hook.put({"index": index})
    assert hook.dropped >= 6
    assert hook.waiting <= 3
    hook.close(0.1)


def test_a_webhook_follows_no_redirect():
    receiver = Receiver(status=302)
    hook = Webhook(receiver.url)
    hook.put({})
    wait_for(lambda: receiver.bodies, 5, "nothing arrived")
    hook.close(0.1)
    receiver.close()
    assert hook.posted == 0


def test_a_short_secret_is_refused(tmp_path):
    (tmp_path / "secret").write_text("short")
    with pytest.raises(KeyFileError):
        Webhook("http://127.0.0.1:1/", secret=tmp_path / "secret")
