"""First steps of the child process that opens a supplier's file: it gives up the network, then loads the rest.

Who the attacker is: a file that takes over onnx or onnxruntime. Rules: a name space can only be left while the process
has one thread, so nothing heavier than the standard library is imported before; the kernel's answer is checked and goes
into ``reply.json`` as ``network``, because a service manager may forbid new name spaces.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
KEPT = frozenset({"OMP_NUM_THREADS", "ORT_DISABLE_TELEMETRY"})
TAKEN, LEFT = "taken away", "could not be taken away"


def leave_network() -> str:
    """Move this process into a network name space without interfaces and return ``taken away``, or why it is not.

    With the right to do so the user stays who he is; otherwise a user name space of its own gives that right.
    """
    here = Path("/proc/self/ns/net")
    try:
        before = here.readlink()
        unshare = ctypes.CDLL(None, use_errno=True).unshare
        if unshare(CLONE_NEWNET) and unshare(CLONE_NEWUSER | CLONE_NEWNET):
            return f"{LEFT}: {os.strerror(ctypes.get_errno())}"
        return TAKEN if here.readlink() != before else f"{LEFT}: the name space is still the same"
    except (OSError, AttributeError) as error:
        return f"{LEFT}: {error}"


def main(request: Path) -> None:
    """Leave the network, forget the environment but ``KEPT``, then open the file that the request names."""
    network = leave_network()
    kept = {name: value for name, value in os.environ.items() if name in KEPT}
    os.environ.clear()
    os.environ.update(kept)
    from edgepriv.risk.reconstruction.model_worker import serve

    reply = serve(request) | {"network": network}
    (request.parent / "reply.json").write_text(json.dumps(reply))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
