"""``python -m edgepriv`` is the console command ``edgepriv``."""

from edgepriv.cli import main

main()
