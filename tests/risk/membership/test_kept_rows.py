"""An audit that was cut goes on with the models it has, ends as an uncut one, and never takes up another's rows."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from edgepriv import datasets
from edgepriv.cli import synthesis_study as studies
from edgepriv.risk.membership.classifier import Recipe
from edgepriv.risk.membership.kept_rows import KeptRows, digest_of
from edgepriv.risk.membership.shadows import no_defence


@pytest.fixture(scope="module")
def parts():
    torch.set_num_threads(1)
    return studies.take_parts(datasets.load("digits", split="all", limit=700), None, 0)


def run(parts, settings, stop_at=99):
    """Margins, and how many models were trained for them."""
    trained = []

    def pipeline(images, labels, seed):
        if len(trained) == stop_at:
            raise KeyboardInterrupt
        trained.append(seed)
        return no_defence(images, labels, seed)

    return studies.shadows_of(parts, settings, pipeline, "real data", released=False).margins, len(trained)


def test_a_cut_audit_trains_the_rest_only_and_ends_as_an_uncut_one(parts, tmp_path):
    base = studies.Settings(recipe=Recipe(epochs=2), targets=14)
    kept = replace(base, keep=tmp_path / "rows")
    whole, every = run(parts, base)
    with pytest.raises(KeyboardInterrupt):
        run(parts, kept, stop_at=5)
    files = sorted(kept.keep.glob("*.npz"))
    assert len(files) == 5
    assert all(file.stat().st_mode & 0o077 == 0 for file in (*files, kept.keep))
    files[0].write_bytes(b"cut short")  # a row that cannot be read is made again
    resumed, rest = run(parts, kept)
    assert (every, rest) == (14, 10)
    assert np.array_equal(whole, resumed)
    _, others = run(parts, replace(kept, recipe=Recipe(epochs=1)))
    assert others == 14


def test_rows_of_other_records_settings_or_weights_have_another_name(tmp_path):
    images = np.zeros((3, 2), np.uint8)
    names = {
        digest_of("release", images), digest_of("real data", images), digest_of("release", images + np.uint8(1)),
        digest_of("release", images.reshape(2, 3)), digest_of("release", images, images),
    }  # fmt: skip
    assert len(names) == 5
    rows = KeptRows(tmp_path / "rows", "name")
    rows.write(3, (np.arange(3.0), np.zeros(0)))
    assert rows.read(3)[0].tolist() == [0.0, 1.0, 2.0]
    assert rows.read(4) is None
