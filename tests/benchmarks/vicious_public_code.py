"""One epoch of joint training in a process of its own: the paper's public code where a clone is named, else ours.

    python vicious_public_code.py PICTURES.npz [CLONE]

Same work for both: 1,000 training and 250 validation pictures of 32x32, WRN-28-1 and its decoder, batches of 125
pictures and 125 augmented copies, raw outputs, one thread. The clone's own training function runs unchanged; its
plots are not drawn.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import time
import types
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

TRAINING = 1000


def public(images: np.ndarray, labels: np.ndarray, clone: str) -> Iterator[None]:
    import matplotlib as mpl

    mpl.use("Agg")
    sys.path.insert(0, clone)
    sys.modules.setdefault("torchsummary", types.SimpleNamespace(summary=None))  # imported, never called here
    with_operators_declared()
    from TDRA import models, trainers

    x = (images.transpose(0, 3, 1, 2) / 255).astype(np.float32)
    form = {"num_classes": 10, "width": 1, "mean": (0.1,), "std": (0.3,), "num_input_channels": 1}
    classifier, decoder = models.WideResNet(**form), models.DecWideResNet(**form, input_type="Raw")
    settings = types.SimpleNamespace(
        dataset="mnist", device="cpu", n_epochs=1, n_batch=250, with_aug=True, lr=1e-3, hl_delta=1.0, beta_1=1.0,
        beta_2=3.0, alpha_mse=5.0, alpha_ssim=1.0, image_size=32, n_channels=1, attributes=list(range(10)),
    )  # fmt: skip
    parts = ((x[:TRAINING], labels[:TRAINING]), (x[TRAINING:], labels[TRAINING:]))
    yield
    with contextlib.redirect_stdout(io.StringIO()):
        trainers.train_enc_dec_cat(settings, classifier, decoder, parts)


def with_operators_declared() -> None:
    """Let a torchvision import whose compiled part belongs to another build of torch: none of it is used here."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        torch.library.register_fake = lambda *_args, **_kwargs: lambda function: function


def ours(images: np.ndarray, labels: np.ndarray) -> Iterator[None]:
    from edgepriv.risk.reconstruction.vicious import Recipe, Trainer, TrainingSet

    data = TrainingSet.of(images, labels, classes=10)
    trainer = Trainer(Recipe(architecture="wrn28-1", augment=True, epochs=1), data)
    trainer._train, trainer._valid = data.part(slice(0, TRAINING)), data.part(slice(TRAINING, None))
    yield
    trainer.run_epoch()


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with np.load(sys.argv[1]) as archive:
        images, labels = archive["images"], archive["labels"]
    work = public(images, labels, sys.argv[2]) if len(sys.argv) > 2 else ours(images, labels)
    next(work)
    started, cpu = time.monotonic(), time.process_time()
    for _ in work:
        pass
    result = {"wall_s": time.monotonic() - started, "cpu_s": time.process_time() - cpu, "torch": torch.__version__}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
