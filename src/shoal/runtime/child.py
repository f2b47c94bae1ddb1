"""What ``python -P -m shoal.runtime.child`` runs: the background process. Started by :mod:`shoal.runtime.process` only."""

from __future__ import annotations

from shoal.runtime.server import main

if __name__ == "__main__":
    main()
