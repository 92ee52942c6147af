#!/usr/bin/env python3
"""Coverage-guided fuzzing of everything that parses bytes from outside (needs `pip install atheris`).

    python tests/attacks/fuzz_cipher.py -max_total_time=60

The invariant is one sentence: any bytes give a value or one documented error. Each input goes to every parser; for the
opener also as a body behind an authentic header, so that the fuzzer gets past the first checks.
"""

import sys

import atheris

with atheris.instrument_imports(include=["edgepriv"]):
    import numpy as np

    from edgepriv.cipher import container
    from edgepriv.cipher.cipher import FrameOpener
    from edgepriv.cipher.epochs import DeviceEpoch
    from edgepriv.cipher.picture import decode_meta, encode_meta
    from edgepriv.errors import EdgeprivError, WireError
    from edgepriv.keys import Identity
    from edgepriv.wire import cbor, enrolment, envelope, epoch, message, messages, trust

DEVICE, GATEWAY, ANN = (Identity.new(role, "x") for role in ("device", "gateway", "recipient"))
TRUST = trust.TrustList(1, 0, 2**40, (DEVICE.public, GATEWAY.public, ANN.public))
EPOCH = DeviceEpoch.open(DEVICE, TRUST, GATEWAY.name, seq=0, now=0)
SEALED = EPOCH.seal(np.zeros((8, 8), np.uint8))
OPENER = FrameOpener(EPOCH.signed.raw, ANN, TRUST)


def check_description(raw):
    assert encode_meta(decode_meta(raw[:64], 1 << 20)) == raw[:64]


def check_cbor(raw):
    assert cbor.encode(cbor.decode(raw, max_bytes=4096)) == raw


def check_opener(raw):
    candidate = SEALED[:112] + raw
    if candidate[:-16] != SEALED[:-16]:
        OPENER.open(candidate)
        raise AssertionError("an altered envelope was opened")


PARSERS = (
    check_cbor,
    check_description,
    check_opener,
    container.unpack,
    envelope.parse,
    lambda raw: epoch.read_epoch(raw, TRUST),
    lambda raw: trust.read_trust(raw, bytes(32), now=0),
    message.decode,
    messages.decode,
    lambda raw: enrolment.read_token(raw.decode("latin-1")),
)


def one_input(raw):
    for parse in PARSERS:
        try:
            parse(raw)
        except (EdgeprivError, WireError):
            continue


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
