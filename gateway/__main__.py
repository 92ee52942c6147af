"""``python -m gateway`` is ``edgepriv-gateway``."""

from gateway.cli import main

main()
