"""A script written against the reference page of hivemind's averager runs with ``import shoal as hivemind``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("spec_page.py")
LIMIT = 110.0


def begin(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.sweep
def test_the_page_from_its_first_parameter_to_its_last_method():
    first = begin("0")
    peers = [first]
    try:
        assert first.stdout is not None
        addresses = first.stdout.readline().split()
        assert addresses, first.communicate(timeout=LIMIT)[1]
        peers.append(begin("1", *addresses))
        outputs = [peer.communicate(timeout=LIMIT) for peer in peers]
    finally:
        for peer in peers:
            peer.kill()
            peer.wait()
    for peer, (out, err) in zip(peers, outputs, strict=True):
        assert peer.returncode == 0, err
        assert out.splitlines()[-1] == "done", err
