"""Altered, swapped, replayed and misdirected frames: refused before any plaintext byte is released."""

import dataclasses
import os
import subprocess
import sys
import textwrap

import cbor2
import numpy as np
import pytest

from edgepriv import primitives
from edgepriv.cipher import cipher, container, layers
from edgepriv.cipher.cipher import FrameOpener, open_frame
from edgepriv.cipher.epochs import DeviceEpoch
from edgepriv.cipher.opened import OpenedFrames
from edgepriv.errors import AuthenticationError, EdgeprivError, RefusedError, ReplayError, TrustError, WireError
from edgepriv.keys import Identity
from edgepriv.wire import envelope as wire
from edgepriv.wire import epoch as wire_epoch
from edgepriv.wire.allowed import Allowed
from edgepriv.wire.epoch import read_epoch, unwrap_link
from edgepriv.wire.link import LinkSession
from edgepriv.wire.trust import TrustList

NOW = 1_800_000_000.0
DEVICE, OTHER = Identity.new("device", "cam1"), Identity.new("device", "cam2")
GATEWAY = Identity.new("gateway", "one")
ANN, BOB, EVE = (Identity.new("recipient", name) for name in ("ann", "bob", "eve"))
IMAGE = np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3)


def trust_for(*recipients, policy=None, revoked=()):
    parties = tuple(i.public for i in (DEVICE, OTHER, GATEWAY, *recipients))
    return TrustList(1, 0, 2**40, parties, policy=policy or {}, revoked=revoked, digest=b"1" * 32)


def new_epoch(trust=None, device=DEVICE, **kwargs):
    return DeviceEpoch.open(device, trust or trust_for(ANN), GATEWAY.name, seq=1, now=NOW, **kwargs)


def at_gateway(epoch, raw, device=DEVICE):
    record = epoch.signed.record
    session = LinkSession(unwrap_link(record, GATEWAY), record.epoch_id, record.party, side="gateway")
    wire.verify_for_gateway(wire.parse(raw), session, epoch.signed, device.public)


def rejected(function, *args):
    try:
        function(*args)
    except (WireError, AuthenticationError):
        return True
    return False


@pytest.fixture
def no_release(monkeypatch):
    """Fails the test if layers 1 and 2 are ever removed: nothing may be decrypted beyond a refused AEAD."""
    monkeypatch.setattr(cipher, "remove_layers", lambda *a, **k: pytest.fail("plaintext was released"))


@pytest.mark.parametrize("recipients", [(ANN,), (ANN, BOB)], ids=["link-mac", "ed25519"])
@pytest.mark.parametrize(("profile", "alg"), [(p, a) for p in wire.PROFILES for a in wire.ALGS])
def test_every_single_bit_flip_is_refused_by_gateway_and_recipient(profile, alg, recipients, no_release):
    trust = trust_for(*recipients)
    epoch = new_epoch(trust, profile=profile, alg=alg)
    raw = bytearray(epoch.seal(IMAGE))
    at_gateway(epoch, raw)
    opener = FrameOpener(epoch.signed.raw, ANN, trust)
    # With one recipient the outer MAC is the gateway's: a recipient cannot check it, and its bits change no image.
    covered = len(raw) - (16 if len(recipients) == 1 else 0)
    for bit in range(8 * len(raw)):
        raw[bit // 8] ^= 1 << bit % 8
        assert rejected(at_gateway, epoch, raw), f"the gateway took bit {bit}"
        if bit // 8 < covered:
            assert rejected(opener.open, raw), f"the recipient took bit {bit}"
        raw[bit // 8] ^= 1 << bit % 8


def test_every_bit_of_the_record_is_bound():
    trust = trust_for(ANN)
    epoch = new_epoch(trust)
    sealed, record = epoch.seal(IMAGE), bytearray(epoch.signed.raw)
    for bit in range(8 * len(record)):
        record[bit // 8] ^= 1 << bit % 8
        with pytest.raises((WireError, AuthenticationError, TrustError)):
            open_frame(sealed, bytes(record), ANN, trust)
        record[bit // 8] ^= 1 << bit % 8


def test_every_truncation_and_extension_is_refused(no_release):
    trust = trust_for(ANN)
    epoch = new_epoch(trust)
    raw = epoch.seal(IMAGE)
    opener = FrameOpener(epoch.signed.raw, ANN, trust)
    for cut in [*(raw[:i] for i in range(len(raw))), raw + b"\x00", raw[1:], raw * 2]:
        assert rejected(opener.open, cut)
        assert rejected(at_gateway, epoch, cut)


def test_parts_of_two_frames_do_not_mix(no_release):
    trust = trust_for(ANN)
    epoch = new_epoch(trust)
    a, b = epoch.seal(IMAGE), epoch.seal(IMAGE)
    opener = FrameOpener(epoch.signed.raw, ANN, trust)
    cuts = [16, 48, 80, 112, len(a) - 32, len(a) - 16]
    for i in cuts:
        for mixed in (a[:i] + b[i:], b[:i] + a[i:]):
            assert rejected(at_gateway, epoch, mixed)
            if i < len(a) - 16:
                assert rejected(opener.open, mixed)


def test_a_frame_of_another_epoch_or_device_is_refused():
    trust = trust_for(ANN)
    first, second, foreign = new_epoch(trust), new_epoch(trust), new_epoch(trust, device=OTHER)
    raw = first.seal(IMAGE)
    for epoch in (second, foreign):
        assert rejected(open_frame, raw, epoch.signed.raw, ANN, trust)
        assert rejected(at_gateway, epoch, raw)
    assert rejected(at_gateway, first, raw, OTHER)


def resigned(epoch, identity=DEVICE, **changes):
    return wire_epoch.sign_epoch(dataclasses.replace(epoch.signed.record, **changes), identity)


def test_a_frame_cannot_be_downgraded_even_by_a_record_that_the_device_signed():
    """The record's digest is in the header: another record, though authentic, does not fit the frame."""
    trust = trust_for(ANN)
    epoch = new_epoch(trust, profile="flep3-strong")
    raw = epoch.seal(IMAGE)
    for changes in ({"profile": "aead"}, {"alg": primitives.CHACHA}, {"auth": "ed25519"}, {"seq": 2}):
        assert rejected(open_frame, raw, resigned(epoch, **changes).raw, ANN, trust)


def test_a_header_that_differs_from_its_own_record_is_refused():
    """A device that lies about itself: the header's digest fits, its profile or algorithm does not."""
    trust = trust_for(ANN)
    epoch = new_epoch(trust, profile="flep3")
    raw = bytearray(epoch.seal(IMAGE))
    for offset, value in ((5, 0), (5, 2), (6, 2 if raw[6] == 1 else 1), (7, 2)):
        changed = bytes(raw[:offset]) + bytes([value]) + bytes(raw[offset + 1 :])
        assert rejected(open_frame, changed, epoch.signed.raw, ANN, trust)
        assert rejected(at_gateway, epoch, changed)


def test_a_receiver_accepts_only_what_its_list_holds():
    trust = trust_for(ANN)
    epoch = new_epoch(trust, profile="aead", alg=primitives.CHACHA)
    raw, record = epoch.seal(IMAGE), epoch.signed.raw
    assert open_frame(raw, record, ANN, trust).pixels is not None
    for allowed in (
        Allowed(profiles=("flep3",)),
        Allowed(algs=(primitives.AES_GCM,)),
        Allowed(auths=("ed25519",)),
        Allowed(min_version=2),
        Allowed(max_frames=5),
    ):
        with pytest.raises(TrustError, match="does not permit"):
            open_frame(raw, record, ANN, trust, allowed=allowed)
    pinned = trust_for(ANN, policy={DEVICE.name: {"profiles": ["flep3"]}})
    with pytest.raises(TrustError, match="does not permit the profile aead"):
        open_frame(raw, record, ANN, pinned)


def test_a_sender_makes_nothing_that_its_receivers_refuse():
    for policy, settings in (
        ({"profiles": ["flep3"]}, {"profile": "aead"}),
        ({"algs": [primitives.AES_GCM]}, {"alg": primitives.CHACHA}),
        ({"auth": "link-mac"}, {}),  # with two recipients either could forge to the other
        ({"min_version": 2}, {}),
    ):
        with pytest.raises(RefusedError, match="does not permit"):
            new_epoch(trust_for(ANN, BOB, policy={DEVICE.name: policy}), **settings)
    assert new_epoch(trust_for(ANN, policy={"*": {"max_frames": 5}})).signed.record.max_frames == 5


def test_nobody_else_opens_a_frame():
    trust = trust_for(ANN)
    epoch = new_epoch(trust)
    raw, record = epoch.seal(IMAGE), epoch.signed
    for outsider in (EVE, BOB, GATEWAY, DEVICE, OTHER):
        with pytest.raises(TrustError, match="not addressed"):
            open_frame(raw, record.raw, outsider, trust)
    # A stanza relabelled to another key's hint does not open either.
    stanza = EVE.public.key_id + record.record.stanzas[0][8:]
    bent = wire_epoch.sign_epoch(dataclasses.replace(record.record, stanzas=(stanza,)), DEVICE)
    with pytest.raises(AuthenticationError):
        open_frame(raw, bent.raw, EVE, trust)


def test_a_record_commits_to_one_content_key():
    """A dishonest device that wraps two content keys: the second recipient refuses the record."""
    trust = trust_for(ANN, BOB)
    epoch = new_epoch(trust)
    record = epoch.signed.record
    other = wire_epoch.wrap_stanza(BOB.public, bytes(32), record.party, record.epoch_id)
    two = resigned(epoch, stanzas=(record.stanzas[0], other))
    FrameOpener(two.raw, ANN, trust)
    with pytest.raises(AuthenticationError):
        FrameOpener(two.raw, BOB, trust)


def test_gcm_alone_would_open_to_two_keys_and_the_commitment_refuses_one():
    """The commitment covers the frame's keys: under another content key it does not fit, before any decryption."""
    trust = trust_for(ANN)
    epoch = new_epoch(trust)
    opener = FrameOpener(epoch.signed.raw, ANN, trust)
    opener._ck = bytes(32)
    opened = []
    original = primitives.backend().open_into
    try:
        primitives.backend().open_into = lambda *a: opened.append(a) or original(*a)
        with pytest.raises(AuthenticationError):
            opener.open(epoch.seal(IMAGE))
    finally:
        del primitives.backend().open_into
    assert not opened


def test_a_recipient_forges_to_another_only_where_that_is_allowed():
    """Positive control: with a shared MAC any holder of ck makes frames the other accepts; signatures stop it."""
    shared = trust_for(ANN, BOB, policy={"*": {"allow_recipient_forgery": True}})
    for trust, forgeable in ((shared, True), (trust_for(ANN, BOB), False)):
        epoch = new_epoch(trust)
        ck = wire_epoch.unwrap_content(epoch.signed.record, ANN)  # what Ann holds, and no more
        session = LinkSession(bytes(32), epoch.signed.record.epoch_id, DEVICE.name, side="party")
        forged = bytes(cipher.FrameSealer(ck, epoch.signed, session, ANN).seal(IMAGE + 1, counter=0, mid=bytes(32)))
        assert rejected(open_frame, forged, epoch.signed.raw, BOB, trust) is not forgeable
        assert rejected(at_gateway, epoch, forged)
    with pytest.raises(TrustError, match="forge"):  # a receiver whose list forbids it refuses the device's choice
        FrameOpener(new_epoch(shared).signed.raw, ANN, trust_for(ANN, BOB))


def test_replays_are_duplicates_and_reused_counters_are_conflicts(tmp_path):
    trust = trust_for(ANN)
    epoch = new_epoch(trust)
    frames = [epoch.seal(IMAGE) for _ in range(3)]
    opener = FrameOpener(epoch.signed.raw, ANN, trust, opened=OpenedFrames(tmp_path / "opened"))
    for i in (2, 0, 1):  # order does not matter
        assert opener.open(frames[i]).pixels is not None
    opener = FrameOpener(epoch.signed.raw, ANN, trust, opened=OpenedFrames(tmp_path / "opened"))  # after a restart
    for raw in frames:
        with pytest.raises(ReplayError, match="duplicate"):
            opener.open(raw)
        assert open_frame(raw, epoch.signed.raw, ANN, trust).pixels is not None  # without a memory the attack succeeds
    ck = wire_epoch.unwrap_content(epoch.signed.record, ANN)
    same_counter = cipher.FrameSealer(ck, epoch.signed, epoch.session, DEVICE).seal(IMAGE, counter=1, mid=bytes(32))
    again = FrameOpener(epoch.signed.raw, ANN, trust, opened=OpenedFrames(tmp_path / "opened", again=True))
    assert again.open(frames[1]).pixels is not None
    for one in (opener, again):
        with pytest.raises(ReplayError, match="conflict"):
            one.open(same_counter)


def test_a_bent_tag_to_the_gateway_makes_no_other_frame(tmp_path):
    """The recipient cannot check that tag, so it is no part of what it remembers."""
    trust = trust_for(ANN)
    epoch = new_epoch(trust)
    raw = epoch.seal(IMAGE)
    opener = FrameOpener(epoch.signed.raw, ANN, trust, opened=OpenedFrames(tmp_path / "opened"))
    bent = raw[:-1] + bytes([raw[-1] ^ 1])
    assert rejected(at_gateway, epoch, bent)
    assert opener.open(bent).pixels is not None
    with pytest.raises(ReplayError, match="duplicate"):
        opener.open(raw)


def test_a_forged_frame_does_not_use_up_its_counter(tmp_path):
    trust = trust_for(ANN)
    epoch = new_epoch(trust)
    raw = epoch.seal(IMAGE)
    opener = FrameOpener(epoch.signed.raw, ANN, trust, opened=OpenedFrames(tmp_path / "opened"))
    assert rejected(opener.open, raw[:-17] + bytes([raw[-17] ^ 1]) + raw[-16:])
    assert opener.open(raw).pixels is not None


def test_revoked_parties_neither_send_nor_receive():
    trust = trust_for(ANN, BOB)
    epoch = new_epoch(trust)
    raw = epoch.seal(IMAGE)
    without_device = trust_for(ANN, BOB, revoked=(DEVICE.name,))
    with pytest.raises(TrustError, match="revoked"):
        open_frame(raw, epoch.signed.raw, ANN, without_device)
    with pytest.raises(TrustError, match="revoked"):
        new_epoch(without_device)
    without_ann = trust_for(ANN, BOB, revoked=(ANN.name,))
    assert len(new_epoch(without_ann).signed.record.stanzas) == 1
    with pytest.raises(TrustError, match="no recipient"):
        new_epoch(trust_for(ANN, revoked=(ANN.name,)))


def test_a_gateway_that_adds_itself_or_a_recipient_is_refused():
    """The gateway controls the broker and its own keys; recipients and device keys come from the signed list alone."""
    trust = trust_for(ANN)
    epoch = new_epoch(trust)
    fake = resigned(epoch, identity=GATEWAY, stanzas=())
    with pytest.raises((WireError, AuthenticationError)):
        read_epoch(fake.raw, trust)
    raw = cbor2.loads(epoch.signed.raw)
    body = cbor2.loads(raw[0])
    added = wire_epoch.wrap_stanza(EVE.public, bytes(32), DEVICE.name, body["epoch_id"])
    body["stanzas"] = [*body["stanzas"], added]
    bent = cbor2.dumps([cbor2.dumps(body, canonical=True), raw[1]], canonical=True)
    with pytest.raises(AuthenticationError):
        read_epoch(bent, trust)


def test_an_epoch_ends_with_its_last_frame():
    epoch = new_epoch(max_frames=2)
    trust = trust_for(ANN)
    assert not epoch.needs_rotation(NOW, trust)
    epoch.seal(IMAGE)
    epoch.seal(IMAGE)
    assert epoch.needs_rotation(NOW, trust)
    with pytest.raises(RefusedError):
        epoch.seal(IMAGE)


def test_an_epoch_ends_by_age_and_by_a_new_list():
    trust = trust_for(ANN)
    epoch = new_epoch(trust)
    assert not epoch.needs_rotation(NOW + 3599, trust)
    assert epoch.needs_rotation(NOW + 3600, trust)
    assert epoch.needs_rotation(NOW - 3600, trust)
    assert epoch.needs_rotation(NOW, dataclasses.replace(trust, digest=b"2" * 32))


@pytest.mark.parametrize("layer", ["permute_into", "mask_into", "synthetic"])
def test_a_layer_that_is_the_identity_is_noticed(layer, monkeypatch):
    """Each layer does something: replaced by the identity, its effect on a structured picture is gone."""
    payload = np.repeat(np.arange(64, dtype=np.uint8), 64)
    alg = primitives.AES_GCM

    def through(profile):
        keys = cipher.frame_keys(bytes(32), bytes(32), bytes(80), profile)
        out = np.empty(payload.size + (32 if profile == "flep3-strong" else 0), np.uint8)
        cipher.apply_layers(payload, profile, alg, keys, out)
        return out

    def works():
        keys = cipher.frame_keys(bytes(32), bytes(32), bytes(80), "flep3")
        strong_keys = cipher.frame_keys(bytes(32), bytes(32), bytes(80), "flep3-strong")
        unmasked = through("flep3").copy()
        layers.mask_into(unmasked, keys.layer2, alg, unmasked)
        permuted = not np.array_equal(unmasked, payload) and np.array_equal(np.sort(unmasked), np.sort(payload))
        masked = len(np.unique(through("flep3"))) > 200
        other = payload.copy()
        other[0] ^= 1
        pair = np.empty((2, payload.size + 32), np.uint8)
        for row, picture in zip(pair, (payload, other), strict=True):
            cipher.apply_layers(picture, "flep3-strong", alg, strong_keys, row)
        diffused = np.mean(pair[0] != pair[1]) > 0.98
        return {"permute_into": permuted, "mask_into": masked, "synthetic": diffused}

    assert all(works().values())
    identity = {
        "permute_into": lambda payload, key, alg, out: np.copyto(out, payload),
        "mask_into": lambda data, key, alg, out: np.copyto(out, data),
        "synthetic": lambda data, key, mac_key, alg: bytes(32),
    }
    real_mask = layers.mask_into
    monkeypatch.setattr(layers, layer, identity[layer])
    if layer == "permute_into":
        monkeypatch.setattr(layers, "mask_into", real_mask)
    assert not works()[layer]


@pytest.mark.parametrize("alg", list(wire.ALGS))
def test_layers_do_not_undo_each_other(alg):
    """A changed byte through layers 1 and 2 of the strong profile changes the whole, whatever its place."""
    keys = cipher.frame_keys(bytes(32), bytes(32), bytes(80), "flep3-strong")
    payload = np.zeros(64 * 64 * 3, np.uint8)
    base = np.empty(payload.size + 32, np.uint8)
    cipher.apply_layers(payload, "flep3-strong", alg, keys, base)
    for place in (0, 1, 4095, 4096, payload.size - 1):
        changed = payload.copy()
        changed[place] ^= 1
        out = np.empty_like(base)
        cipher.apply_layers(changed, "flep3-strong", alg, keys, out)
        assert np.mean(out != base) > 0.98


def test_identical_images_never_give_identical_envelopes():
    trust = trust_for(ANN)
    epoch = new_epoch(trust)
    seen = [epoch.seal(IMAGE) for _ in range(1000)]
    assert len({wire.parse(raw).mid for raw in seen}) == 1000
    assert len({bytes(wire.parse(raw).ciphertext) for raw in seen}) == 1000


def test_an_epoch_refuses_to_work_in_a_forked_child():
    epoch = new_epoch()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # the child only reports and leaves
        try:
            epoch.seal(IMAGE)
            os.write(write, b"sealed")
        except RuntimeError:
            os.write(write, b"refused")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    assert os.read(read, 16) == b"refused"
    os.close(read)
    assert epoch.seal(IMAGE)


def test_fresh_epochs_after_fork_and_restart_share_nothing():
    """Children and restarted processes open epochs of their own; ids, keys and ciphertexts differ."""
    read, write = os.pipe()
    for _ in range(3):
        child = os.fork()
        if child == 0:
            epoch = new_epoch()
            os.write(write, epoch.signed.record.epoch_id + wire.parse(epoch.seal(IMAGE)).mid)
            os._exit(0)
        os.waitpid(child, 0)
    os.close(write)
    rows = [os.read(read, 48) for _ in range(3)]
    os.close(read)
    assert len({row[:16] for row in rows}) == len({row[16:] for row in rows}) == 3


RUN_UNTIL_KILLED = textwrap.dedent("""
    import sys, time
    from pathlib import Path
    import numpy as np
    from edgepriv.cipher import container
    from edgepriv.cipher.epochs import DeviceEpoch
    from edgepriv.keys import load_identity
    from edgepriv.cli import pinned_trust
    home = Path(sys.argv[1])
    trust = pinned_trust.read(home / "trust.cbor", home / "owner.pub")
    epoch = DeviceEpoch.open(load_identity(home / "device.key"), trust, "gateway-one", seq=1, now=time.time())
    image = np.full((32, 32, 3), 77, np.uint8)
    for i in range(5):
        (home / f"frame{i}.epf").write_bytes(container.pack(epoch.signed.raw, epoch.seal(image)))
    print("ready", flush=True)
    time.sleep(60)
""")


def test_nothing_on_the_disk_of_a_killed_device_opens_what_it_sent(tmp_path):
    """SIGKILL, then every file and every 32-byte window of the key files as a key against every stored frame."""
    from edgepriv.wire.trust import sign_trust

    owner = Identity.new("owner", "owner")
    DEVICE.save(tmp_path / "device.key")
    (tmp_path / "owner.pub").write_text(owner.public.to_text())
    (tmp_path / "trust.cbor").write_bytes(sign_trust(trust_for(ANN), owner))
    process = subprocess.Popen([sys.executable, "-c", RUN_UNTIL_KILLED, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"ready\n"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    stored = [container.unpack(path.read_bytes()) for path in sorted(tmp_path.glob("frame*.epf"))]
    assert len(stored) == 5
    record = read_epoch(stored[0][0], trust_for(ANN)).record
    candidates = {bytes(32), DEVICE._ed25519, DEVICE._x25519, DEVICE.agree(ANN.public.x25519)}
    for path in tmp_path.iterdir():
        data = path.read_bytes()
        candidates |= {data[i : i + 32] for i in range(len(data) - 31)}
    for ck in candidates:
        assert not primitives.equal(wire_epoch.commitment(ck, record.party, record.epoch_id), record.commitment)
    for raw_record, envelope in stored:  # the device's own keys as a recipient's
        with pytest.raises(EdgeprivError):
            open_frame(bytes(envelope), raw_record, DEVICE, trust_for(ANN))
        assert open_frame(bytes(envelope), raw_record, ANN, trust_for(ANN)).pixels is not None


def test_secrets_do_not_show_in_reprs_or_pickles():
    import pickle

    epoch = new_epoch()
    ck = wire_epoch.unwrap_content(epoch.signed.record, ANN)
    keys = cipher.frame_keys(ck, bytes(32), bytes(80), "flep3")
    for shown in (repr(epoch), repr(epoch.session), repr(DEVICE), repr(keys)):
        assert ck.hex() not in shown
        assert "hidden" in shown
    for secret in (epoch, epoch.session, DEVICE):
        with pytest.raises(TypeError):
            pickle.dumps(secret)
