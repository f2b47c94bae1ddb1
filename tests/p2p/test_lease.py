"""The lock beside a key file: who holds it, what it says, and where there can be none."""

from __future__ import annotations

import os
from pathlib import Path

from shoal.p2p.lease import Holder, KeyLease
from shoal.p2p.multiaddr import Multiaddr

ADDRESS = Multiaddr.parse("/ip4/10.0.0.1/tcp/4000")


def open_lease(key: Path) -> KeyLease:
    lease = KeyLease.open(str(key))
    assert lease is not None
    return lease


def test_one_at_a_time_and_the_next_reads_where_to_ask(tmp_path: Path) -> None:
    key = tmp_path / "peer.key"
    first, second = open_lease(key), open_lease(key)
    assert first.try_to_hold()
    first.write([ADDRESS], client=False)
    assert not second.try_to_hold()
    assert second.read().addresses == (ADDRESS,)
    assert str(os.getpid()) in second.read().process
    first.close()
    assert second.try_to_hold()
    assert second.read() == Holder()
    second.close()


def test_links_to_a_key_share_its_lock(tmp_path: Path) -> None:
    key, link = tmp_path / "peer.key", tmp_path / "elsewhere.key"
    link.symlink_to(key)
    first, second = open_lease(key), open_lease(link)
    assert first.try_to_hold()
    assert not second.try_to_hold()
    first.close()
    second.close()


def test_what_makes_no_sense_is_nobody(tmp_path: Path) -> None:
    key = tmp_path / "peer.key"
    lease = open_lease(key)
    texts = (
        "",
        "nonsense",
        "[]",
        "null",
        '{"pid": "x"}',
        '{"pid": 1, "machine": "m", "addresses": ["/x"], "client": 1}',
    )
    for text in texts:
        Path(f"{key}.lock").write_text(text)
        assert lease.read() == Holder()
    lease.close()


def test_without_a_place_for_it_there_is_no_lease(tmp_path: Path) -> None:
    assert KeyLease.open(str(tmp_path / "missing" / "peer.key")) is None
    (tmp_path / "other.key.lock").symlink_to(tmp_path / "elsewhere")
    assert KeyLease.open(str(tmp_path / "other.key")) is None
