"""The VAE trains, resumes and travels; the generator releases what it should; the claims say no more than is true."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from edgepriv import datasets
from edgepriv.errors import ConfigError, DataError, MissingFileError
from edgepriv.synthesis import card as cards
from edgepriv.synthesis import generator, training
from edgepriv.synthesis.release import mechanism_of, read_card, shadow_releases, write_release
from edgepriv.synthesis.vae import Vae, default_config


@pytest.fixture(scope="module")
def digits():
    torch.set_num_threads(1)
    return datasets.load("digits", split="all", limit=300)


@pytest.fixture(scope="module")
def vae(digits):
    return training.train_vae(digits.images, digits.labels, default_config((8, 8, 1), 10, epochs=8), seed=1)


def mechanism(vae, digits, **changes):
    scale = generator.latent_scale(vae, digits.images, digits.labels)
    return generator.mechanism_for(scale, vae.config.latent_dim, **changes)


@pytest.mark.parametrize("shape", [(8, 8, 1), (14, 14, 1), (28, 28, 1), (32, 32, 3), (9, 13, 3)])
@pytest.mark.parametrize("classes", [0, 4])
def test_every_default_network_encodes_and_decodes_its_own_shape(shape, classes):
    config = default_config(shape, classes, **({"kind": "conv"} if shape[0] == 9 else {}))
    net = Vae(config)
    x, y = torch.rand(3, shape[2], *shape[:2]), torch.tensor([0, 3, 1])
    logits, mean, log_variance = net(x, y, torch.zeros(3, config.latent_dim))
    assert logits.shape == x.shape
    assert mean.shape == log_variance.shape == (3, config.latent_dim)


def test_training_learns_and_is_the_same_for_the_same_seed(digits, vae):
    again = training.train_vae(digits.images, digits.labels, vae.config, seed=1)
    other = training.train_vae(digits.images, digits.labels, vae.config, seed=2)
    first = vae.state_dict()
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in first.items())
    assert not all(torch.equal(value, other.state_dict()[key]) for key, value in first.items())
    scale = generator.latent_scale(vae, digits.images, digits.labels)
    assert 0.5 < scale.mean_norm < 10


@pytest.mark.parametrize(("dp", "kind"), [(None, "mlp"), (None, "conv"), (training.DpSgd(8.0), "mlp")])
def test_a_run_that_was_cut_resumes_to_the_same_weights(tmp_path, digits, dp, kind):
    config = default_config((8, 8, 1), 10, epochs=3, hidden=16, kind=kind)
    whole = training.train_vae(digits.images, digits.labels, config, seed=3, dp=dp)
    file = tmp_path / "checkpoint"

    def cut(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.train_vae(digits.images, digits.labels, config, seed=3, dp=dp, checkpoint=file, progress=cut)
    assert file.stat().st_mode & 0o077 == 0
    seen = []
    resumed = training.train_vae(
        digits.images, digits.labels, config, seed=3, dp=dp, checkpoint=file, progress=lambda *a: seen.append(a)
    )
    assert seen == [(3, 3)]
    assert all(torch.allclose(v, resumed.state_dict()[k], atol=1e-6) for k, v in whole.state_dict().items())


def test_a_checkpoint_of_other_data_or_settings_is_refused(tmp_path, digits):
    config, file = default_config((8, 8, 1), 10, epochs=1, hidden=16), tmp_path / "checkpoint"
    training.train_vae(digits.images, digits.labels, config, seed=3, checkpoint=file)
    with pytest.raises(ConfigError, match="other data"):
        training.train_vae(digits.images[:200], digits.labels[:200], config, seed=3, checkpoint=file)
    with pytest.raises(ConfigError, match="another configuration"):
        training.train_vae(digits.images, digits.labels, replace(config, beta=1.0), seed=3, checkpoint=file)
    with pytest.raises(ConfigError, match="other data"):
        training.train_vae(digits.images, digits.labels, config, seed=4, checkpoint=file)
    file.write_bytes(b"not a checkpoint")
    with pytest.raises(DataError, match="not a VAE"):
        training.train_vae(digits.images, digits.labels, config, seed=3, checkpoint=file)


def test_weights_trained_plainly_are_never_taken_up_by_a_run_that_promises_dp_sgd(tmp_path, digits):
    config, file = default_config((8, 8, 1), 10, epochs=2, hidden=16), tmp_path / "checkpoint"
    budget = training.DpSgd(8.0)

    def train(dp):
        training.train_vae(digits.images, digits.labels, config, seed=3, dp=dp, checkpoint=file)

    train(None)
    for other in (budget, training.DpSgd(4.0)):
        with pytest.raises(ConfigError, match="another configuration"):
            train(other)
    file.unlink()
    train(budget)
    for other in (None, training.DpSgd(4.0)):
        with pytest.raises(ConfigError, match="another configuration"):
            train(other)


def test_dp_training_spends_no_more_than_its_budget():
    from dp_accounting import dp_event, pld

    sigma = training.noise_multiplier_for(training.DpSgd(4.0, 1e-5), 0.1, 200)
    event = dp_event.PoissonSampledDpEvent(0.1, dp_event.GaussianDpEvent(sigma))
    spent = pld.PLDAccountant(value_discretization_interval=1e-3).compose(event, 200).get_epsilon(1e-5)
    assert 3.9 < spent <= 4.0
    with pytest.raises(ConfigError, match="positive epsilon"):
        training.noise_multiplier_for(training.DpSgd(0.0), 0.1, 10)


def test_a_release_has_the_promised_count_and_labels(digits, vae):
    made = mechanism(vae, digits, copies=2, extra=1)
    images, labels = generator.synthesize(vae, digits.images, digits.labels, made, np.random.default_rng(0))
    assert images.dtype == np.uint8
    assert images.shape == (900, 8, 8, 1)
    assert (np.bincount(labels) == 3 * np.bincount(digits.labels)).all()


def test_the_same_generator_state_gives_the_same_release_and_another_does_not(digits, vae):
    made = mechanism(vae, digits)
    first, second, third = (
        generator.synthesize(vae, digits.images, digits.labels, made, np.random.default_rng(seed))[0]
        for seed in (0, 0, 1)
    )
    assert (first == second).all()
    assert (first != third).any()


def test_a_prior_release_does_not_depend_on_the_private_pixels(digits, vae):
    made = mechanism(vae, digits, mode="prior")
    blank = np.zeros_like(digits.images)
    real = generator.synthesize(vae, digits.images, digits.labels, made, np.random.default_rng(4))
    fake = generator.synthesize(vae, blank, digits.labels, made, np.random.default_rng(4))
    assert (real[0] == fake[0]).all()


def test_randomised_labels_are_kept_at_the_promised_rate(digits, vae):
    made = mechanism(vae, digits, mode="prior", label_epsilon=1.5, classes=10)
    rng = np.random.default_rng(0)
    kept = [(generator._released_labels(digits.labels, made, rng) == digits.labels).mean() for _ in range(40)]
    assert np.mean(kept) == pytest.approx(np.exp(1.5) / (np.exp(1.5) + 9), abs=0.02)


def test_randomised_labels_do_not_depend_on_which_classes_the_private_records_have(digits, vae):
    """Without labels in the VAE the number of classes came from the private labels: it is a part of the mechanism."""
    bare = training.train_vae(digits.images, digits.labels, default_config((8, 8, 1), 0, epochs=1, hidden=16), seed=1)
    made, few = mechanism(bare, digits, label_epsilon=0.1, classes=10), digits.labels < 3
    labels = generator.synthesize(bare, digits.images[few], digits.labels[few], made, np.random.default_rng(0))[1]
    assert set(labels) == set(range(10))
    with pytest.raises(DataError, match="outside the 3 classes"):
        generator.synthesize(bare, digits.images, digits.labels, replace(made, classes=3), np.random.default_rng(0))


def test_an_optimiser_that_cannot_be_fused_is_replaced_by_one_that_need_not():
    from edgepriv.risk.membership import classifier

    weights = [torch.nn.Parameter(torch.zeros(2, device="meta"))]  # a device without the kernel
    for adamw in (training._adamw, classifier._adamw):
        assert not adamw(weights, 1e-3).param_groups[0]["fused"]
        assert adamw([torch.nn.Parameter(torch.zeros(2))], 1e-3).param_groups[0]["fused"]


def test_clipping_bounds_what_reaches_the_noise(digits, vae):
    made = replace(mechanism(vae, digits), clip_radius=0.5)
    assert np.linalg.norm(generator._codes(vae, digits.images, digits.labels, made), axis=1).max() <= 0.5 + 1e-9


def test_the_claim_never_promises_what_private_weights_break(digits, vae):
    made = mechanism(vae, digits)
    for private in (made, mechanism(vae, digits, mode="prior")):
        found = generator.guarantee(private, 12, "private")
        assert "differentially" not in found.claim.lower()
        assert "kappa" in found.claim
        assert "bound" not in found.claim
        assert "meaningful" not in found.claim
        assert found.kappa is not None
        assert (found.epsilon, found.delta, found.advantage_bound) == (None, None, None)
    public = generator.guarantee(made, 12, "public")
    assert "differentially private" in public.claim
    assert "given its label" in public.claim
    assert public.kappa == pytest.approx(2 * made.clip_radius * made.epsilon)
    bare = generator.guarantee(mechanism(vae, digits, mode="unsafe_no_noise"), 12, "public")
    assert bare.epsilon is None
    assert "differentially" not in bare.claim


def test_what_labels_training_and_copies_cost_is_added(digits, vae):
    one = generator.guarantee(mechanism(vae, digits), 12, "public")
    two = generator.guarantee(mechanism(vae, digits, copies=2), 12, "public")
    labelled = generator.guarantee(mechanism(vae, digits, label_epsilon=1.0, classes=10), 12, "public")
    trained = generator.guarantee(mechanism(vae, digits), 12, "dp", (2.0, 1e-5))
    prior = generator.guarantee(mechanism(vae, digits, mode="prior"), 12, "public")
    assert two.kappa == pytest.approx(2 * one.kappa)
    assert two.epsilon > one.epsilon
    assert labelled.epsilon == pytest.approx(one.epsilon + 1.0)
    assert "given its label" not in labelled.claim
    assert trained.epsilon == pytest.approx(one.epsilon + 4.0)
    assert (prior.kappa, prior.epsilon, prior.advantage_bound) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epsilon": 0.0}, "epsilon must be a positive"),
        ({"epsilon": -2.0}, "epsilon must be a positive"),
        ({"noise_ratio": 0.0}, "noise ratio"),
        ({"noise_ratio": 2.0, "epsilon": 1.0}, "not both"),
        ({"copies": 0}, "copies"),
        ({"mode": "prior", "noise_ratio": 2.0}, "no effect"),
        ({"mode": "unsafe_no_noise", "epsilon": -1.0}, "no effect"),
        ({"label_epsilon": 1.0}, "at least 2 classes"),
        ({"label_epsilon": 0.0, "classes": 10}, "label epsilon must be a positive"),
    ],
)
def test_a_wrong_knob_is_a_clear_error(changes, words):
    with pytest.raises(ConfigError, match=words):
        generator.mechanism_for(generator.LatentScale(2.0, 0.7), 8, **changes)


def test_bad_training_data_is_a_clear_error(digits):
    config = default_config((8, 8, 1), 10)
    with pytest.raises(DataError, match="fewer than the 12 latent dimensions"):
        training.train_vae(digits.images[:5], digits.labels[:5], config, seed=0)
    with pytest.raises(DataError, match="VAE takes uint8"):
        training.train_vae(digits.images.astype(np.float32), digits.labels, config, seed=0)
    with pytest.raises(DataError, match="labels must lie"):
        training.train_vae(digits.images, digits.labels + 5, config, seed=0)
    with pytest.raises(DataError, match="cannot be synthesised"):
        default_config((8, 8, 2), 10)
    with pytest.raises(ConfigError, match="at least 2 latent"):
        default_config((8, 8, 1), 10, latent_dim=1)


def example_card(**changes):
    fields = {
        "data": "digits", "records": 300, "released": 300, "mode": "noised", "latent_dim": 12, "clip_radius": 4.0,
        "latent_rms": 0.7, "noise_ratio": 2.0, "epsilon_metric": 2.5, "kappa": 20.0, "epsilon": 19.0, "delta": 1e-5,
        "advantage_bound": 0.99, "copies": 1, "extra": 0, "vae_trained_on": "public", "vae_images": 300,
        "vae_budget": None, "labels": "exact", "claim": "<claim>", "held_out": "none",
    }  # fmt: skip
    return cards.ReleaseCard(**{**fields, **changes})


def test_a_release_is_read_back_as_a_data_set_and_as_a_mechanism(tmp_path, digits, vae):
    card, out = example_card(labels="randomised_response:1.5", classes=10), tmp_path / "out"
    write_release(out, digits.images, digits.labels, card, {"pictures": b"png"}, vae)
    loaded = datasets.load(out, split="all")
    assert len(loaded) == 300
    assert sorted(map(bytes, loaded.images)) == sorted(map(bytes, digits.images))
    assert mechanism_of(read_card(out)).label_epsilon == 1.5
    masks = np.random.default_rng(0).random((3, 300)) < 0.5
    shadows = list(shadow_releases(out, digits.images, digits.labels, masks, 0))
    assert [len(images) for images, _ in shadows] == masks.sum(axis=1).tolist()
    page = (out / "card.html").read_text()
    assert "&lt;claim&gt;" in page
    assert "http" not in page.replace("http-equiv", "")


def test_a_release_is_never_overwritten_and_private_weights_never_travel(tmp_path, digits, vae):
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="stays where it is"):
        write_release(out, digits.images, digits.labels, example_card(vae_trained_on="private"), {}, vae)
    write_release(out, digits.images, digits.labels, example_card(), {})
    assert shadow_releases(out, digits.images, digits.labels, np.ones((1, 300), bool), 0) is None
    with pytest.raises(ConfigError, match="not empty"):
        write_release(out, digits.images, digits.labels, example_card(), {})


def test_a_broken_card_is_a_clear_error(tmp_path):
    with pytest.raises(MissingFileError):
        read_card(tmp_path)
    for text in ("{", "[]", json.dumps({"schema": "other"})):
        (tmp_path / "card.json").write_text(text)
        with pytest.raises(DataError):
            read_card(tmp_path)
    with pytest.raises(DataError, match="lacks or garbles"):
        mechanism_of({"schema": cards.SCHEMA, "labels": "exact", "mode": "noised"})


def audited(outcome="none", **changes):
    limits = {"auc": 0.60, "tpr": 0.05, "rate": 0.01}
    fields = {"outcome": outcome, "auc": 0.52, "strongest": "lira", "limits": limits, "weak_because": ["few shadows"]}
    return {**fields, "max_tpr_at_1pct": {"attack": "nearest", "tpr": 0.012}, **changes}


def test_the_recommendation_names_what_is_as_good_and_what_leaks():
    measured = {"accuracy_synthetic": 0.90, "accuracy_public_only": 0.92, "accuracy_prior_samples": 0.8}
    fine = audited()
    assert "public data alone" in cards.recommend(example_card(**measured, audit=fine))
    measured["accuracy_public_only"] = 0.5
    assert "Release: it gains" in cards.recommend(example_card(**measured, audit=fine))
    caught = {**measured, "audit": audited("leak", auc=0.9, strongest="nearest_lira")}
    assert "raise --noise-ratio" in cards.recommend(example_card(**caught))
    louder = cards.recommend(example_card(**caught, suggestion=cards.Suggestion(6.0, 0.55)))
    assert "with --noise-ratio 6 " in louder
    assert "audited whole" in louder
    assert "--mode prior" in cards.recommend(example_card(**caught, suggestion=cards.Suggestion(None, 0.6)))
    assert "Do not release" in cards.recommend(example_card(**measured, audit=fine, vae_trained_on="private"))
    measured["accuracy_prior_samples"] = 0.9
    assert "generator samples" in cards.recommend(example_card(**measured, audit=fine))
    assert "generator samples" not in cards.recommend(example_card(**measured, audit=fine, mode="prior"))
    assert "Not measured" in cards.recommend(example_card())
    assert "Not measured" in cards.recommend(example_card(**measured))


@pytest.mark.parametrize(
    ("outcome", "words"), [("void", "audit is void"), ("weak", "few shadows"), ("leak", "finds 8.0% of them at 1.0%")]
)
def test_release_is_said_of_no_audit_but_one_that_found_nothing(outcome, words):
    measured = {"accuracy_synthetic": 0.90, "accuracy_public_only": 0.5, "accuracy_prior_samples": 0.5}
    judged = audited(outcome, max_tpr_at_1pct={"attack": "nearest", "tpr": 0.08})  # with a harmless AUC
    told = cards.recommend(example_card(**measured, audit=judged))
    assert told.startswith("Do not release")
    assert words in told
    assert "Release: it gains" not in told
