"""The background process: what :mod:`shoal.runtime.process_link` starts, and nobody else."""

from __future__ import annotations

from shoal.runtime.server import main

if __name__ == "__main__":
    main()
