"""A verdict admits a model at the gateway only where it holds for every policy that the devices release under."""

import pytest
from gateway_site import Site
from model_site import Maker

from edgepriv.device.packing import Limits


@pytest.mark.parametrize(
    ("policies", "withheld"),
    [
        ([], ""),
        (["argmax"], ""),
        (["softmax:1", "argmax"], ""),
        (["unsafe_raw_logits"], "it was judged for argmax,softmax:1, not for unsafe_raw_logits"),
        (["argmax", "topk:3", "softmax:2"], "it was judged for argmax,softmax:1, not for softmax:2, topk:3"),
    ],
)
def test_a_model_that_was_not_judged_for_the_sites_policies_is_withheld(tmp_path, policies, withheld):
    site = Site(tmp_path, models={"policies": policies})
    models, maker = site.gateway().models, Maker(risk=site.keys["risk-lab"], now=int(site.now))
    path = tmp_path / "m.onnx"
    path.write_bytes(b"any bytes")
    digest = models.add(path, name="m", version="1", actor="op", now=site.now)
    raw = maker.verdict(model=digest, policy="argmax,softmax:1")
    models.take_verdict(raw, "risk-lab", site.now)
    assert models.listed(site.now)[0]["withheld"] == withheld
    assert bool(models.offers("dev-cam1", "device", site.now)) == (not withheld)


def test_a_verdict_of_an_older_form_is_shown_and_breaks_nothing(tmp_path):
    site = Site(tmp_path)
    models, maker = site.gateway().models, Maker(risk=site.keys["risk-lab"], now=int(site.now))
    path = tmp_path / "m.onnx"
    path.write_bytes(b"any bytes")
    digest = models.add(path, name="m", version="1", actor="op", now=site.now)
    older = dict.fromkeys(("purifier", "output", "scale", "mean", "colour"))
    models.take_verdict(maker.verdict(model=digest, **older), "risk-lab", site.now)
    assert models.listed(site.now)[0]["verdict"] == "low leakage"


def test_the_verdicts_inside_a_protected_models_delivery_must_hold_for_the_policies_too(tmp_path):
    site = Site(tmp_path, models={"policies": ["softmax:1"]})
    models, maker = site.gateway().models, Maker(site.owner, site.keys["risk-lab"], now=int(site.now))
    path = tmp_path / "eye.delivery"
    path.write_bytes(maker.delivery(1, limits=Limits()))
    models.add(path, name="", version="", actor="op", now=site.now)
    assert models.listed(site.now)[0]["withheld"] == "it was judged for argmax, not for softmax:1"
