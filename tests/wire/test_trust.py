"""The trust list: only the pinned owner's signature counts, versions never go back, roles never mix."""

import dataclasses

import cbor2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepriv.errors import TrustError
from edgepriv.keys import Identity, PublicIdentity
from edgepriv.wire.trust import TrustList, read_trust, sign_trust

OWNER, MALLORY = Identity.new("owner", "owner"), Identity.new("owner", "owner")
DEVICE, GATEWAY = Identity.new("device", "cam1"), Identity.new("gateway", "one")
ANN = Identity.new("recipient", "ann")
LIST = TrustList(
    5, 100, 1000, (DEVICE.public, GATEWAY.public, ANN.public), policy={"*": {"a": 1}, "dev-cam1": {"b": 2}}
)


def read(raw, **kwargs):
    return read_trust(raw, OWNER.public.ed25519, **{"now": 500, **kwargs})


def test_a_signed_list_is_read_back():
    trust = read(sign_trust(LIST, OWNER))
    assert dataclasses.replace(trust, digest=b"") == LIST
    assert len(trust.digest) == 32
    assert trust.party("dev-cam1", "device") == DEVICE.public
    assert trust.policy_for("dev-cam1") == {"a": 1, "b": 2}
    assert trust.policy_for("dev-new") == {"a": 1}


@pytest.mark.parametrize(
    ("kwargs", "words"), [({"now": 1000}, "expired"), ({"min_version": 6}, "older"), ({"now": 10**12}, "expired")]
)
def test_expired_and_rolled_back_lists_are_refused(kwargs, words):
    with pytest.raises(TrustError, match=words):
        read(sign_trust(LIST, OWNER), **kwargs)


def test_only_the_pinned_owner_signs():
    for signer in (MALLORY, GATEWAY, DEVICE):
        with pytest.raises(TrustError, match="not signed"):
            read(sign_trust(LIST, signer))
    body, signature = cbor2.loads(sign_trust(LIST, OWNER))
    for bad in ([body, b""], [body, signature, b""], [b"", signature], [signature, body], {"body": body}):
        with pytest.raises(TrustError):
            read(cbor2.dumps(bad, canonical=True))


def test_a_gateway_that_edits_the_list_is_refused():
    body, signature = cbor2.loads(sign_trust(LIST, OWNER))
    fields = cbor2.loads(body)
    eve = Identity.new("recipient", "eve").public
    for parties in (
        [*fields["parties"], [eve.role, eve.name, eve.ed25519, eve.x25519]],
        fields["parties"][:-1],
    ):
        bent = cbor2.dumps({**fields, "parties": parties}, canonical=True)
        with pytest.raises(TrustError, match="not signed"):
            read(cbor2.dumps([bent, signature], canonical=True))


@pytest.mark.parametrize(
    "parties",
    [
        (),
        (DEVICE.public, DEVICE.public),
        (PublicIdentity("device", "op-x", bytes(32), bytes(32)),),
        (PublicIdentity("owner", "owner", bytes(32), bytes(32)),),
        (PublicIdentity("king", "king-x", bytes(32), bytes(32)),),
        (GATEWAY.public, PublicIdentity("recipient", "op-x", bytes(32), GATEWAY.public.x25519)),
        (GATEWAY.public, PublicIdentity("recipient", "op-x", GATEWAY.public.ed25519, bytes(32))),
    ],
)
def test_empty_contradictory_and_dangerous_lists_are_never_signed(parties):
    with pytest.raises(TrustError):
        sign_trust(dataclasses.replace(LIST, parties=parties), OWNER)


def test_revoked_and_unknown_parties_have_no_role():
    trust = dataclasses.replace(LIST, revoked=(ANN.name,))
    assert trust.with_role("recipient") == ()
    with pytest.raises(TrustError, match="revoked"):
        trust.party(ANN.name, "recipient")
    with pytest.raises(TrustError, match="not in the trust list"):
        trust.party("dev-none", "device")
    with pytest.raises(TrustError, match="not in the trust list"):
        trust.party(DEVICE.name, "gateway")


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 7))
def test_any_flipped_bit_is_refused(place, bit):
    raw = bytearray(sign_trust(LIST, OWNER))
    raw[place % len(raw)] ^= 1 << bit
    with pytest.raises(TrustError):
        read(bytes(raw))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_one_documented_error(raw):
    with pytest.raises(TrustError):
        read(raw)


def test_another_list_of_a_version_that_was_seen_is_a_rollback():
    """An owner who signs from a stale copy would otherwise bring back a device that the newest list revokes."""
    newest = sign_trust(dataclasses.replace(LIST, revoked=(DEVICE.name,)), OWNER)
    stale = sign_trust(LIST, OWNER)
    seen = read(newest).digest
    assert read(stale, min_version=5).party(DEVICE.name) == DEVICE.public  # without the digest the attack succeeds
    with pytest.raises(TrustError, match="another trust list of version 5"):
        read(stale, min_version=5, seen_digest=seen)
    assert read(newest, min_version=5, seen_digest=seen).revoked == (DEVICE.name,)
    assert read(sign_trust(dataclasses.replace(LIST, version=6), OWNER), min_version=5, seen_digest=seen).version == 6


def test_a_revoked_partys_keys_do_not_come_back_under_another_name():
    revoked = dataclasses.replace(LIST, revoked=(DEVICE.name,))
    again = PublicIdentity("device", "dev-cam9", DEVICE.public.ed25519, DEVICE.public.x25519)
    with pytest.raises(TrustError, match="keys of a party that is revoked"):
        sign_trust(dataclasses.replace(revoked, parties=(*LIST.parties, again)), OWNER)
    fresh = Identity.new("device", "cam9").public
    assert read(sign_trust(dataclasses.replace(revoked, parties=(*LIST.parties, fresh)), OWNER)).party("dev-cam9")


@pytest.mark.parametrize("name", ["dev-a/#/+", "dev-", "dev-A", "dev-\x1b[2J", "cam1", "dev-" + "a" * 49, "dev-a b"])
def test_names_that_could_do_harm_in_a_topic_or_a_terminal_are_refused(name):
    party = PublicIdentity("device", name, DEVICE.public.ed25519, DEVICE.public.x25519)
    with pytest.raises(TrustError, match="is no name of a 'device'"):
        sign_trust(TrustList(1, 0, 1000, (party,)), OWNER)
