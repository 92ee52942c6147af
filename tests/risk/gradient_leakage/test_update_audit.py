"""The audit around the attack: canaries, rounds, masks, class inversion, the trade-off and the demo's pictures."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from edgepriv import datasets  # noqa: E402
from edgepriv.errors import DataError  # noqa: E402
from edgepriv.federated.ledger import epsilon_of  # noqa: E402
from edgepriv.federated.local_recipe import LocalRecipe, head_recipe  # noqa: E402
from edgepriv.federated.torch_trainer import train_locally  # noqa: E402
from edgepriv.risk.gradient_leakage import audit, page, protections, tradeoff, tradeoff_page  # noqa: E402
from edgepriv.risk.gradient_leakage.class_inversion import invert_classes  # noqa: E402
from edgepriv.risk.gradient_leakage.fleet_view import fleet_view, with_head  # noqa: E402
from edgepriv.risk.gradient_leakage.inversion import Attack  # noqa: E402


@pytest.fixture(scope="module")
def canaries(digits):
    return audit.make_canaries(
        digits.private[:4], digits.private_labels[:4], digits.public[:500], digits.public_labels[:500], epochs=3
    )


@pytest.fixture(scope="module")
def trained(digits):
    model = digits.network(0)
    update = train_locally(model, digits.public, digits.public_labels, LocalRecipe(0.05, 16, epochs=5), seed=0)
    model.load_state_dict({k: v + torch.tensor(update.tensors[k]) for k, v in model.state_dict().items()})
    return model


def test_a_round_without_protection_leaks_and_clipped_noise_contains_it(digits, canaries):
    model, recipe = digits.network(0), LocalRecipe(batch_size=4)
    unprotected, _ = audit.audit_round(model, recipe, canaries, round_number=1)
    assert unprotected["verdict"] == "leaks"
    assert unprotected["attack"]["psnr_db"] >= 25
    protection = protections.ClippedNoise(1.0, 0.05)
    contained, _ = audit.audit_round(model, recipe, canaries, round_number=1, protection=protection)
    assert contained["verdict"] == "contained"
    assert contained["attack"]["iip"] == 0
    assert contained["bound_psnr_db"] - contained["bound_floor_db"] < 1
    record = json.loads(json.dumps(contained))
    assert record["schema"] == "edgepriv.round-audit/1"
    assert record["round"] == 1
    assert record["recipe"]["batch_size"] == 4
    assert "no device's images" in record["about"]


def test_keeping_statistics_at_home_lowers_attack_and_bound_on_one_image(digits, canaries):
    model, recipe, one = digits.network(0), LocalRecipe(), canaries.take(slice(0, 1))
    shared, _ = audit.audit_round(model, recipe, one, round_number=1)
    home, _ = audit.audit_round(model, recipe, one, round_number=1, protection=protections.WithoutStatistics())
    assert shared["attack"]["psnr_db"] - home["attack"]["psnr_db"] >= 10
    assert shared["bound_psnr_db"] - home["bound_psnr_db"] >= 10


def test_clipped_statistics_do_not_hide_an_update_from_an_attacker_who_ignores_them(digits, canaries):
    model, recipe = digits.network(0), LocalRecipe(batch_size=4)
    clipped = protections.ClippedNoise(0.05, 0.0, shares_statistics=True)
    assert audit.audit_round(model, recipe, canaries, round_number=1, protection=clipped)[0]["verdict"] == "leaks"


def test_a_masked_sum_shows_less_than_one_device(digits, canaries):
    model, recipe = digits.network(0), LocalRecipe(batch_size=4)
    many = replace(canaries, images=digits.private[:16], labels=digits.private_labels[:16])
    sum_only = audit.canary_update(model, recipe, many, clients=4)
    attack = Attack(iterations=60)
    masked = audit.judge_update(model, sum_only, recipe, many, clients=4, attack=attack, sigmas=None)
    alone = audit.judge_update(
        model, audit.canary_update(model, recipe, canaries), recipe, canaries, attack=attack, sigmas=None
    )
    assert alone.leakage.psnr_db - masked.leakage.psnr_db >= 10
    assert "no bound" in masked.reason or masked.verdict == "leaks"


def test_a_head_only_update_of_one_image_is_inverted_through_the_backbone(trained, canaries):
    one = canaries.take(slice(0, 1))
    record, _ = audit.audit_round(
        trained, head_recipe(batch_size=1), one, round_number=3, attack=Attack(iterations=150)
    )
    assert record["verdict"] == "leaks"
    assert record["attack"]["psnr_db"] >= 30


def test_several_images_in_a_head_only_update_hide_each_other(trained, canaries):
    record, _ = audit.audit_round(trained, head_recipe(), canaries, round_number=3)
    assert record["attack"]["mean_mse_psnr_db"] <= 20


def test_public_images_that_equal_a_canary_leave_the_pool(digits):
    held = audit.make_canaries(
        digits.public[:2], digits.public_labels[:2], digits.public[:50], digits.public_labels[:50], epochs=1
    )
    assert len(held.public) == 48
    with pytest.raises(DataError, match="two public"):
        audit.make_canaries(digits.public[:2], digits.public_labels[:2], digits.public[:2], digits.public_labels[:2])


def test_class_inversion_is_recognised_on_a_trained_model_and_not_on_a_fresh_one(digits, trained):
    known = (digits.private[:300], digits.private_labels[:300])
    found = invert_classes(trained, 10, *known, iterations=100)
    fresh = invert_classes(digits.network(5), 10, *known, iterations=40)
    assert found.recognised >= 0.8
    assert fresh.recognised <= 0.5
    assert "images" not in found.record()


def test_epsilon_by_dp_accounting_agrees_with_the_devices_ledger():
    for z, rounds in ((1.0, 10), (5.0, 3)):
        exact = epsilon_of(math.sqrt(rounds) / z, 1e-5)
        found = tradeoff.epsilon(z, rounds, 1e-5)
        assert exact <= found <= 1.25 * exact
    assert tradeoff.epsilon(0.0, 10, 1e-5) is None


@pytest.fixture(scope="module")
def sweep():
    """A federation of four on a few digits: no noise, and noise, seen singly and, without noise, as a masked sum."""
    data = datasets.load("digits", limit=200)
    world = tradeoff.make_world(data, "cnn-bn", clients=3, seed=0, canaries=1, devices=2, masks=True)
    grid = tradeoff.settings_grid(
        clips=(0.5,), noises=(0.0, 1.0), batch_sizes=(4,), epoch_counts=(1,), statistics="home", learning_rate=0.1,
        masks="plain",
    )  # fmt: skip
    return tradeoff.run(world, grid, rounds=1, audited=2, attack=Attack(iterations=40))


def test_the_tradeoff_shows_what_noise_and_masks_do_and_at_what_cost(sweep):
    plain, masked, noisy = sweep.points
    assert [p.setting.kind for p in sweep.points] == ["BN home", "BN home, masks", "BN home"]
    assert plain.iip > noisy.iip
    assert plain.fresh["psnr_db"] > masked.fresh["psnr_db"]
    assert (masked.fresh["clients"], plain.fresh["attacks"]) == (3, 2)
    assert masked.accuracy == plain.accuracy
    assert [number for number, _ in plain.leaks] == [1, 2]
    assert sweep.recommended is noisy
    assert json.loads(json.dumps(sweep.record()))["points"][1]["masked"]


def test_the_tradeoffs_page_has_curves_over_noise_and_over_rounds(sweep):
    html = tradeoff_page.tradeoff_html(sweep)
    for title in ("Trade-off: IIP", "Attack over noise: PSNR", "Bound over noise", "Attack over rounds"):
        assert title in html
    assert "<script" not in html
    assert "* clip 0.5, noise 1" in tradeoff_page.as_text(sweep)


@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_the_gateway_opens_rounds_with_the_recommended_setting(sweep, tmp_path, chosen):
    from gateway.config import load
    from gateway.round_driver import DRIVER_KEYS, check_settings
    from gateway.round_plan import RoundPlan, announcement

    text = tradeoff_page.recommended_toml(replace(sweep, recommended=sweep.points[chosen]))
    path = tmp_path / "gateway.toml"
    path.write_text('[gateway]\nidentity="i"\nowner="o"\ntrust="t"\nstate="s"\n' + text)
    settings = check_settings(load(path).rounds)
    assert not DRIVER_KEYS & set(settings)
    plan = RoundPlan(1, "m", b"x" * 32, 9, (["head.bias", [10]],), **settings)
    opened = announcement(plan, 4, 0.0)
    assert (opened.privacy, opened.noise) == [("clear", "none"), ("masked", "none"), ("masked", "distributed")][chosen]
    assert opened.privacy == "clear" or opened.survivors == 3
    assert opened.statistics == "home"
    assert LocalRecipe(**opened.training).batch_size == 4


def test_sweeps_of_one_federation_are_put_together(sweep):
    document = json.loads(json.dumps(sweep.record()))
    world = tradeoff.make_world(datasets.load("digits", limit=200), "cnn-bn", clients=3, seed=0, canaries=1)
    again = tradeoff.run(world, [], rounds=1, earlier=[document])
    assert json.loads(json.dumps(again.record()))["points"] == document["points"]
    assert again.recommended == sweep.recommended
    with pytest.raises(DataError, match="other rounds: 1, not 3"):
        tradeoff.run(world, [], rounds=3, earlier=[document])
    with pytest.raises(DataError, match="no sweep"):
        tradeoff.run(world, [], rounds=1, earlier=[{"schema": 1}])


def test_sweeps_of_other_data_models_seeds_or_deltas_are_not_put_together(sweep):
    document = json.loads(json.dumps(sweep.record()))
    data = datasets.load("digits", limit=200)

    def added(rows=data, model="cnn-bn", seed=0, document=document, **kwargs):
        world = tradeoff.make_world(rows, model, clients=3, seed=seed, canaries=1)
        return tradeoff.run(world, [], rounds=1, earlier=[document], **kwargs)

    assert len(added().points) == 3
    for what, change in (
        ("data", {"rows": datasets.load("digits", limit=190)}),
        ("model", {"model": "cnn"}),
        ("seed", {"seed": 1}),
        ("delta", {"delta": 1e-6}),
    ):
        with pytest.raises(DataError, match=f"other {what}"):
            added(**change)
    older = {key: value for key, value in document.items() if key != "federation"}
    with pytest.raises(DataError, match="does not say of which data"):
        added(document=older)


def _with_verdicts(point, *verdicts, gain=0.0):
    said = [
        {**leak, "verdict": v, "reason": f"because {v}"} for (_, leak), v in zip(point.leaks, verdicts, strict=True)
    ]
    raised = [{**leak, "bound_psnr_db": leak["bound_floor_db"] + gain, "iip": 0.0} for leak in said]
    return replace(point, leaks=tuple((n, leak) for (n, _), leak in zip(point.leaks, raised, strict=True)))


def test_only_a_setting_that_is_contained_in_every_round_is_recommended_else_the_gap_is_stated(sweep):
    plain, _, noisy = sweep.points
    assert noisy.verdict == "contained"
    assert (plain.accuracy, plain.verdict) > (noisy.accuracy, "contained")
    leaking = _with_verdicts(plain, "contained", "leaks")
    assert leaking.iip == 0
    assert tradeoff.recommend([leaking, noisy], 0.1) is noisy
    assert tradeoff.recommend([leaking], 1.0) is None
    far, near = (_with_verdicts(plain, "at risk", "contained", gain=gain) for gain in (40.0, 4.0))
    assert tradeoff.recommend([far, near, leaking], 0.1) is near
    assert tradeoff.recommend([far, near, leaking, noisy], 0.1) is noisy
    result = replace(sweep, points=(far, near, leaking), recommended=near)
    assert "NOT contained: at risk in round 1: because at risk" in tradeoff_page.as_text(result)
    assert "# at risk in round 1: because at risk" in tradeoff_page.recommended_toml(result)
    assert "NOT contained" in tradeoff_page.tradeoff_html(result)
    nothing = replace(result, recommended=None)
    assert "nothing is recommended" in tradeoff_page.as_text(nothing)
    missing = _with_verdicts(plain, "at risk", "at risk")
    odd = replace(missing, leaks=tuple((n, {**leak, "bound_psnr_db": None}) for n, leak in missing.leaks))
    assert odd.bound_gain_db == math.inf


def test_without_a_setting_within_the_limit_nothing_is_recommended(sweep):
    with pytest.raises(DataError, match="no setting"):
        tradeoff_page.recommended_toml(replace(sweep, recommended=None))


def test_the_demos_pictures_show_both_devices_before_and_after(digits, trained):
    weight = trained.head.weight.detach().numpy()
    model = with_head(trained.features, weight, trained.head.bias.detach().numpy())
    noise = protections.ClippedNoise(1.0, 0.05)
    views = fleet_view(
        model,
        digits.private[:4],
        digits.private_labels[:4],
        digits.public[:300],
        digits.public_labels[:300],
        head_protections=[noise],
        full_protections=[protections.WithoutStatistics(), noise],
    )
    assert [v.unprotected["verdict"] for v in views] == ["leaks", "leaks"]
    assert all(v.unprotected["iip"] == 1 and v.configured["iip"] <= 0.25 for v in views)
    assert all(v.png.startswith(b"\x89PNG") for v in views)


def test_a_chart_marks_the_recommended_point_and_escapes_names():
    svg = page.chart("t", "x", "y<", {"a&b": [(0, 1), (1, 2)]}, marked=(1, 2))
    assert "y&lt;" in svg
    assert "a&amp;b" in svg
    assert svg.count("<circle") == 4  # two points, one in the legend, the ring
    assert page.chart("t", "x", "y", {}) == ""


def test_nearest_public_image_is_the_nearest():
    public = np.stack([np.zeros((4, 4, 1)), np.ones((4, 4, 1))]).astype(np.float32)
    assert page.nearest_public(public[1:] * 0.8, public).mean() == 1
