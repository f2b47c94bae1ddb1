"""The background process: what :mod:`shoal.runtime.process_link` starts, and nobody else."""

from __future__ import annotations

import os

if __name__ == "__main__":
    # Before numpy or torch is loaded. Parts fit into the cache and are worked on as they come: handing them to other
    # threads costs more than it gains, and far more where the trainer keeps every core busy.
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")

    from shoal.runtime.server import main

    main()
