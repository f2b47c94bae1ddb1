"""Runs a program without CAP_NET_ADMIN: ``python -m benchmarks.network.without_admin PROGRAM ARGUMENT...``.

Root may give its sockets any congestion control. Without this capability it may only use those that are allowed, so
that a program which asks for a better one is measured as on a machine where it cannot have it.
"""

from __future__ import annotations

import ctypes
import os
import sys

PR_CAPBSET_DROP = 24
CAP_NET_ADMIN = 12

if __name__ == "__main__":
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_CAPBSET_DROP, CAP_NET_ADMIN, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "prctl")
    os.execv(sys.argv[1], sys.argv[1:])  # root gets the capabilities of its bounding set anew
