"""Who is invited: exactly a share, or each by its own coin."""

from __future__ import annotations

import random

import pytest

from edgepriv.errors import ConfigError
from gateway.sampling import choose_devices

NAMES = [f"dev-{i}" for i in range(200)]


def test_all_means_all():
    assert choose_devices(NAMES, "all", 0.1) == sorted(NAMES)


def test_a_fixed_sample_has_its_size_and_changes_from_round_to_round():
    one, two = (choose_devices(NAMES, "fixed", 0.25) for _ in range(2))
    assert len(one) == len(two) == 50
    assert one != two


def test_poisson_flips_a_coin_for_each_device():
    source = random.Random(1)
    sizes = [len(choose_devices(NAMES, "poisson", 0.25, source=source)) for _ in range(200)]
    assert 48 < sum(sizes) / 200 < 52
    assert len(set(sizes)) > 10


@pytest.mark.parametrize(("kind", "share"), [("some", 0.5), ("fixed", 0.0), ("poisson", 1.5)])
def test_a_wrong_kind_or_share_is_refused(kind, share):
    with pytest.raises(ConfigError):
        choose_devices(NAMES, kind, share)
