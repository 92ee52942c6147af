"""Opening a protected model: exact with the right permission, impossible with anything else."""

import dataclasses

import numpy as np
import onnxruntime as ort
import pytest

from edgepriv.errors import AuthenticationError, DataError, EdgeprivError, TrustError
from edgepriv.keys import Identity
from edgepriv.selective_encryption import levels, manifest
from edgepriv.selective_encryption.restore import open_carrier, open_level, open_with_key

NOW = 1_900_000_000
DTYPES = ("float32", "float16", "int8")


def run(model, x, *, optimise=True):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model, options) if isinstance(model, bytes) else model.session(ort, options)
    kind = np.float16 if session.get_inputs()[0].type == "tensor(float16)" else np.float32
    return session.run(None, {session.get_inputs()[0].name: x.astype(kind)})[0]


def permit(bundle, level, device, issuer, *, expires_s=NOW + 100):
    key = levels.key_at(bundle.key, bundle.decoded.binding.model_id, len(bundle.decoded.levels), level)
    return manifest.grant(bundle.decoded.binding, level, key, device.public, issuer, now_s=NOW - 5, expires_s=expires_s)


def opened(bundle, permission, device, issuer, *, now_s=NOW, level=None, files=None):
    return open_level(
        bundle.manifest,
        permission,
        files or bundle.files,
        device,
        [issuer.public.ed25519],
        now_s=now_s,
        level=level,
    )


@pytest.mark.parametrize("optimise", [True, False])
@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_highest_level_runs_exactly_like_the_plain_model(
    models, protect, device, issuer, inputs, dtype, external, optimise
):
    plain, made, bundle = protect(models[dtype](), external=external)
    restored = opened(bundle, permit(bundle, 3, device, issuer), device, issuer)
    assert [bytes(a) for a in restored.files] == [bytes(a) for a in made.plain]
    expected = run(plain.SerializeToString(), inputs, optimise=optimise)
    assert np.array_equal(run(restored, inputs, optimise=optimise), expected)
    masked = run(open_carrier(bundle.decoded, bundle.files), inputs, optimise=optimise)
    assert not np.array_equal(masked, expected)


@pytest.mark.parametrize("mode", ["levels", "both", "full"])
def test_each_level_opens_its_own_digest_and_a_lower_one_on_request(models, protect, device, issuer, mode):
    _, made, bundle = protect(models["float32"](), mode=mode)
    for level in (1, 2, 3):
        restored = opened(bundle, permit(bundle, 3, device, issuer), device, issuer, level=level)
        assert restored.digest == levels.model_digest(made.partial(bundle.decoded.levels[level - 1].units).files)
    with pytest.raises(TrustError, match="opens levels 1 to 2"):
        opened(bundle, permit(bundle, 2, device, issuer), device, issuer, level=3)


def test_a_sealed_carrier_has_no_weight_in_clear(models, protect):
    _, made, bundle = protect(models["float32"](), mode="both")
    stored = b"".join(bundle.files.values())
    assert "carrier.onnx" not in bundle.files
    for layer in made.layers:
        raw = made.regions[made.layers.index(layer)].rows(made.plain).tobytes()
        assert raw[:36] not in stored
    with pytest.raises(TrustError, match="sealed"):
        open_carrier(bundle.decoded, bundle.files)


def test_true_weights_of_encrypted_units_are_in_no_file_of_the_bundle(models, protect):
    for dtype in DTYPES:
        _, made, bundle = protect(models[dtype]())
        stored = b"".join(bundle.files.values()) + bundle.manifest
        for number, layer in enumerate(made.layers):
            rows = made.regions[number].rows(made.plain)[made.choice.selected[layer.name]]
            assert all(row.tobytes() not in stored for row in rows)


def test_a_lower_key_does_not_open_a_higher_segment(models, protect):
    _, _, bundle = protect(models["float32"]())
    binding, model_id = bundle.decoded.binding, bundle.decoded.binding.model_id
    second = levels.key_at(bundle.key, model_id, 3, 2)
    with pytest.raises(AuthenticationError):
        levels.unseal(second, binding, 3, bundle.files["level-3.segment"])
    with pytest.raises(DataError, match="does not open level 3"):
        levels.key_at(second, model_id, 2, 3)
    with pytest.raises(AuthenticationError):
        open_with_key(bundle.decoded, second, 3, bundle.files)


@pytest.mark.parametrize("change", ["model_id", "version", "carrier"])
def test_a_segment_opens_only_for_its_model_version_and_carrier(models, protect, change):
    _, _, bundle = protect(models["float32"]())
    other = {"model_id": b"x" * 16, "version": 2, "carrier": bytes(32)}[change]
    binding = dataclasses.replace(bundle.decoded.binding, **{change: other})
    with pytest.raises(AuthenticationError):
        levels.unseal(bundle.key, binding, 3, bundle.files["level-3.segment"])


def test_wrong_permissions_are_refused_with_the_reason(models, protect, device, issuer):
    _, _, bundle = protect(models["float32"]())
    good = permit(bundle, 3, device, issuer)
    other_device = Identity.new("device", "cam2")
    with pytest.raises(TrustError, match="another device"):
        opened(bundle, good, other_device, issuer)
    with pytest.raises(TrustError, match="expired"):
        opened(bundle, good, device, issuer, now_s=NOW + 100)
    _, _, second = protect(models["float32"](), version=2)
    with pytest.raises(TrustError, match="version 1; this is version 2"):
        opened(second, good, device, issuer)
    _, _, foreign = protect(models["float32"](), model_id=b"o" * 16)
    with pytest.raises(TrustError, match="another model"):
        opened(foreign, good, device, issuer)
    stranger = Identity.new("owner", "stranger")
    with pytest.raises(TrustError, match="not a pinned model issuer"):
        opened(bundle, permit(bundle, 3, device, stranger), device, issuer)
    with pytest.raises(TrustError, match="already have expired"):
        permit(bundle, 3, device, issuer, expires_s=NOW - 6)


def test_a_permission_for_one_device_does_not_unwrap_for_another_even_if_fields_are_forged(
    models, protect, device, issuer
):
    _, _, bundle = protect(models["float32"]())
    permission = manifest.decode_permission(permit(bundle, 3, device, issuer), [issuer.public.ed25519])
    thief = Identity.new("device", "thief")
    forged = dataclasses.replace(permission, device=thief.public.x25519)
    with pytest.raises(AuthenticationError):
        manifest.open_permission(forged, thief)
    later = dataclasses.replace(permission, expires_s=permission.expires_s + 1)
    with pytest.raises(AuthenticationError):
        manifest.open_permission(later, device)


@pytest.mark.parametrize("name", ["level-1.segment", "level-3.segment", "carrier.onnx"])
@pytest.mark.parametrize("where", [0, 0.5, -1])
def test_an_altered_file_never_gives_a_model(models, protect, device, issuer, name, where):
    _, _, bundle = protect(models["float32"]())
    content = bytearray(bundle.files[name])
    content[int(where * len(content)) if where >= 0 else -1] ^= 1
    files = {**bundle.files, name: bytes(content)}
    with pytest.raises(EdgeprivError):
        opened(bundle, permit(bundle, 3, device, issuer), device, issuer, files=files)


def test_a_missing_segment_or_a_cut_carrier_is_a_clear_error(models, protect, device, issuer):
    _, _, bundle = protect(models["float32"]())
    permission = permit(bundle, 3, device, issuer)
    without = {name: content for name, content in bundle.files.items() if name != "level-2.segment"}
    with pytest.raises(DataError, match=r"lacks level-2\.segment"):
        opened(bundle, permission, device, issuer, files=without)
    cut = {**bundle.files, "carrier.onnx": bundle.files["carrier.onnx"][:-1]}
    with pytest.raises(AuthenticationError, match="signed size"):
        opened(bundle, permission, device, issuer, files=cut)


def test_an_altered_manifest_or_permission_is_refused(models, protect, device, issuer):
    _, _, bundle = protect(models["float32"]())
    permission = permit(bundle, 3, device, issuer)
    for at in range(0, len(bundle.manifest), 37):
        broken = bytearray(bundle.manifest)
        broken[at] ^= 0x40
        with pytest.raises(EdgeprivError):
            manifest.decode_manifest(bytes(broken), [issuer.public.ed25519])
    for at in range(0, len(permission), 11):
        broken = bytearray(permission)
        broken[at] ^= 0x40
        with pytest.raises(EdgeprivError):
            opened(bundle, bytes(broken), device, issuer)


def test_a_segment_cannot_write_outside_its_regions(models, protect):
    _, made, _ = protect(models["float32"]())
    region = made.regions[0]
    for indexes in ([region.units], [0, 0], [1, 0]):
        plain = (
            np.array([0, len(indexes)], "<u4").tobytes() + np.array(indexes, "<u4").tobytes() + bytes(36 * len(indexes))
        )
        with pytest.raises(DataError, match="does not fit"):
            levels.apply_segment([c.copy() for c in made.masked], made.regions, plain)
    with pytest.raises(DataError, match="does not fit"):
        levels.apply_segment([c.copy() for c in made.masked], made.regions, b"\x00" * 7)


def test_wiping_overwrites_the_restored_weights(models, protect, device, issuer):
    _, _, bundle = protect(models["float32"]())
    restored = opened(bundle, permit(bundle, 3, device, issuer), device, issuer)
    restored.session(ort)
    assert not any(content.any() for content in restored.files)


def test_a_large_file_is_sealed_in_parts_that_cannot_be_cut_exchanged_or_repeated(monkeypatch):
    monkeypatch.setattr(levels, "PART_BYTES", 100)
    binding, key, clear = levels.Binding(b"m" * 16, 1, bytes(32)), b"k" * 32, bytes(range(250))
    sealed = bytes(levels.seal_file(key, binding, 0, clear))
    assert levels.unseal_file(key, binding, 0, sealed) == clear
    assert levels.unseal_file(key, binding, 0, levels.seal_file(key, binding, 0, b"")) == b""
    one, two, rest = sealed[:128], sealed[128:256], sealed[256:]
    for wrong in (one + two, one + rest, two + one + rest, one + one + rest, sealed[:-1], sealed + rest, b"", b"x"):
        with pytest.raises(AuthenticationError):
            levels.unseal_file(key, binding, 0, wrong)
    with pytest.raises(AuthenticationError):
        levels.unseal_file(key, binding, 1, sealed)
