"""A lying gateway asks a device for what would open its update: each request is refused, the honest one is answered."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from edgepriv.errors import RefusedError, WireError
from edgepriv.federated.fixed_point import ring_of, signed
from edgepriv.federated.layout import Layout
from edgepriv.federated.participant import Participant, RoundPolicy
from edgepriv.federated.secagg import Member
from edgepriv.keys import Identity
from edgepriv.primitives import sharing
from edgepriv.wire import message, rounds
from edgepriv.wire.rounds import Cohort, SharesDown, Survivors, Unmask
from edgepriv.wire.trust import TrustList
from gateway.round_plan import RoundPlan, announcement

N = 6


def _read(answer):
    return message.decode(answer[0].body)


class Cohorts:
    """N honest members, driven by hand where the gateway would stand."""

    def __init__(self, *, policy=None, outsiders=0, size=5, lie=None, **noise):
        plan = RoundPlan(
            round=7,
            model="m",
            base=b"b" * 32,
            base_bytes=1,
            tensors=(["w", [size]],),
            privacy="masked",
            min_cohort=4,
            max_weight=1,
            **noise,
        )
        self.opened = dataclasses.replace(announcement(plan, N, 0.0), **(lie or {}))
        self.identities = [Identity.new("device", f"{i}") for i in range(N)]
        listed = self.identities[: N - outsiders]
        self.trust = TrustList(1, 0, 1 << 40, tuple(i.public for i in listed))
        policy = policy or RoundPolicy(min_cohort=4)
        layout = Layout(self.opened.tensors)
        self.members = [Member(self.opened, layout, i, self.trust, policy) for i in self.identities]
        self.adverts = tuple(m.advert for m in self.members)

    def shared(self):
        ups = [_read(m.receive(Cohort(self.adverts))) for m in self.members]
        for i, member in enumerate(self.members):
            member.receive(SharesDown(tuple(range(N)), tuple(up.boxes[i] for up in ups)))
        return self

    def masked(self):
        self.shared()
        self.payloads = [m.masked_payload({"w": np.ones(5, np.float32)}, 1) for m in self.members]
        return self

    def confirmed(self, survivors):
        answers = {i: _read(self.members[i].receive(Survivors(survivors))) for i in survivors}
        return Unmask(tuple(answers), tuple(a.signature for a in answers.values()))


def test_the_honest_protocol_is_answered():
    cohort = Cohorts().masked()
    proof = cohort.confirmed((0, 1, 2, 3, 5))
    reveal = _read(cohort.members[0].receive(proof))
    assert reveal.members == tuple(range(N))
    assert _read(cohort.members[0].receive(proof)) == reveal


def test_a_second_survivor_set_is_refused():
    cohort = Cohorts().masked()
    cohort.confirmed((0, 1, 2, 3, 4))
    with pytest.raises(RefusedError, match="second survivor set"):
        cohort.members[0].receive(Survivors((0, 1, 2, 3, 5)))


def test_shares_need_a_threshold_of_signatures_over_the_very_same_set():
    cohort, other = Cohorts().masked(), (0, 1, 2, 4, 5)
    for i in (1, 2, 4, 5):
        cohort.members[i].receive(Survivors(other))
    elsewhere = [_read(cohort.members[i].receive(Survivors(other))).signature for i in (1, 2, 4, 5)]
    own = _read(cohort.members[0].receive(Survivors((0, 1, 2, 3, 4)))).signature
    with pytest.raises(RefusedError, match="1 valid signatures"):
        cohort.members[0].receive(Unmask((0, 1, 2, 4, 5), (own, *elsewhere)))
    with pytest.raises(RefusedError, match="1 valid signatures"):
        cohort.members[0].receive(Unmask((0,) * 5, (own,) * 5))


def test_shares_before_a_confirmed_set_are_refused():
    with pytest.raises(RefusedError, match="before this device confirmed"):
        Cohorts().masked().members[0].receive(Unmask((), ()))


def test_too_few_survivors_are_refused():
    with pytest.raises(RefusedError, match="below the policy"):
        Cohorts().masked().members[0].receive(Survivors((0, 1, 2)))


def test_survivors_outside_the_members_are_refused():
    with pytest.raises(RefusedError, match="not members"):
        Cohorts().masked().members[0].receive(Survivors((0, 1, 2, 3, 99)))


def test_a_small_cohort_is_refused_whatever_the_announcement_says():
    cohort = Cohorts(policy=RoundPolicy(min_cohort=32))
    with pytest.raises(RefusedError, match="below the policy's 32"):
        cohort.members[0].receive(Cohort(cohort.adverts))


def test_a_device_that_the_gateway_invented_is_refused():
    cohort = Cohorts(outsiders=1)
    with pytest.raises(RefusedError, match="the owner did not list"):
        cohort.members[0].receive(Cohort(cohort.adverts))


def test_an_advertisement_of_another_round_is_refused():
    cohort = Cohorts()
    later = dataclasses.replace(cohort.opened, round=8)
    stale = Member(later, Layout(later.tensors), cohort.identities[1], cohort.trust, RoundPolicy(min_cohort=4))
    with pytest.raises(RefusedError, match="another round"):
        cohort.members[0].receive(Cohort((cohort.adverts[0], stale.advert, *cohort.adverts[2:])))


def test_a_second_masked_view_is_refused():
    cohort = Cohorts().masked()
    with pytest.raises(RefusedError, match="once in a round"):
        cohort.members[0].masked_payload({"w": np.zeros(5, np.float32)}, 1)


def test_a_second_cohort_or_member_set_is_refused():
    cohort = Cohorts().shared()
    with pytest.raises(WireError, match="second cohort"):
        cohort.members[0].receive(Cohort(cohort.adverts[:5]))
    with pytest.raises(WireError, match="second set of members"):
        cohort.members[0].receive(SharesDown((0, 1, 2, 3), (b"",) * 4))


def test_a_box_of_shares_for_another_member_does_not_open():
    cohort = Cohorts()
    ups = [_read(m.receive(Cohort(cohort.adverts))) for m in cohort.members]
    boxes = [up.boxes[0] for up in ups]
    boxes[1], boxes[2] = boxes[2], boxes[1]
    with pytest.raises(RefusedError, match="do not open"):
        cohort.members[0].receive(SharesDown(tuple(range(N)), tuple(boxes)))


def test_shares_at_index_zero_or_outside_the_cohort_are_refused():
    shares = sharing.split(b"s" * 16, 3, 5)
    good = {i + 1: shares[i] for i in range(3)}
    assert sharing.combine(good, 5) == b"s" * 16
    for bad in ({0: b"s" * 16, 1: shares[0]}, {6: shares[0], 1: shares[1]}, {1: b"short", 2: shares[1]}, {}):
        with pytest.raises(WireError):
            sharing.combine(bad, 5)


def test_one_key_for_both_purposes_is_refused():
    cohort = Cohorts()
    advert = dataclasses.replace(
        rounds.read_advert(cohort.adverts[0], cohort.trust), share_key=b"k" * 32, mask_key=b"k" * 32
    )
    with pytest.raises(WireError, match="one key"):
        rounds.read_advert(rounds.sign_advert(advert, cohort.identities[0]), cohort.trust)


def test_what_a_gateway_cannot_seed_it_cannot_rebuild_from_too_few_reveals():
    from gateway.unmasking import mask_keys

    cohort = Cohorts().masked()
    survivors = (0, 1, 2, 3, 5)
    proof = cohort.confirmed(survivors)
    reveals = {i: _read(cohort.members[i].receive(proof)) for i in survivors}
    adverts = [rounds.read_advert(raw, cohort.trust) for raw in cohort.adverts]
    threshold = cohort.members[0].threshold
    assert len(mask_keys(adverts, tuple(range(N)), survivors, reveals, threshold)) == 5 + 5
    few = {i: reveals[i] for i in survivors[: threshold - 1]}
    with pytest.raises(WireError, match="do not fit"):
        mask_keys(adverts, tuple(range(N)), survivors, few, threshold)


NOISE = {"noise": "distributed", "noise_multiplier": 4.0, "clip": 1.0}


def _noise_of_the_sum(cohort, survivors):
    """Deviation over the clip of the noise in the sum of these members, by what they would send without masks."""
    zeros = {"w": np.zeros(4000, np.float32)}
    ring = ring_of(cohort.opened)
    total = sum(signed(cohort.members[i].plain_vector(zeros, 1)[:4000], ring).astype(np.float64) for i in survivors)
    return total.std() / ring.scale


def test_control_the_number_of_survivors_decides_how_much_noise_a_device_adds():
    honest, lied = Cohorts(size=4000, **NOISE), Cohorts(size=4000, lie={"survivors": 1 << 40}, **NOISE)
    assert _noise_of_the_sum(honest, (0, 1, 2, 3)) == pytest.approx(4.0, rel=0.05)
    assert _noise_of_the_sum(lied, range(N)) < 1e-3


@pytest.mark.parametrize("survivors", [1 << 40, N + 1, 0, -1])
def test_noise_that_counts_on_more_devices_than_take_part_is_refused_before_anything_is_sent(survivors):
    cohort = Cohorts(lie={"survivors": survivors}, **NOISE)
    with pytest.raises(RefusedError, match="the noise counts on"):
        cohort.shared()
    with pytest.raises(RefusedError):
        cohort.members[0].masked_payload({"w": np.ones(5, np.float32)}, 1)


def test_fewer_survivors_than_the_noise_counts_on_are_never_unmasked():
    cohort = Cohorts(lie={"survivors": N}, **NOISE).masked()
    with pytest.raises(RefusedError, match="the noise counts on 6 devices, 5 survived"):
        cohort.members[0].receive(Survivors((0, 1, 2, 3, 5)))
    assert cohort.confirmed(tuple(range(N))).members == tuple(range(N))


LIES = {
    "colluders": ({"colluders": 0}, "colluders, this device's policy 1"),
    "negative colluders": ({"colluders": -100}, "colluders, this device's policy 1"),
    "all collude": ({"colluders": 4}, "may leave theirs out"),
    "clear": ({"privacy": "clear"}, "only hides under masks"),
    "weight": ({"max_weight": 1000}, "weight 1"),
    "rounded away": ({"fraction_bits": 0}, "rounded away"),
    "endless": ({"noise_multiplier": 1e308}, "no finite deviation"),
}


@pytest.mark.parametrize("lie", LIES)
def test_an_announcement_whose_noise_would_be_less_than_what_is_charged_is_declined(lie):
    changes, why = LIES[lie]
    cohort = Cohorts(colluders=1, **NOISE)
    policy = RoundPolicy(trainable=("*",), min_cohort=4, colluders=1, max_epsilon=50.0)
    for opened, accepted in ((cohort.opened, True), (dataclasses.replace(cohort.opened, **changes), False)):
        device = Participant(cohort.identities[0], cohort.trust, policy, lambda *_: None)
        answer = _read([device.receive(rounds.step_message(7, "open", opened), 1.0)[0].message])
        assert answer.accept == accepted
        assert accepted or why in answer.reason
        assert device.ledger.rows() == []
