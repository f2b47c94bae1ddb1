"""One key file, several processes: real sockets, locks and signals."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import shoal
from shoal.errors import IdentityInUse


def addresses(dht: shoal.DHT) -> list[str]:
    return [str(address) for address in dht.get_visible_maddrs()]


def test_a_second_dht_with_the_same_key_is_refused(tmp_path: Path) -> None:
    """By the lock on one machine; by the older one, or a third one, where the file alone was copied."""
    key, copy = tmp_path / "peer.key", tmp_path / "copy.key"
    with shoal.DHT(start=True, identity_path=key) as older:
        shutil.copy(key, copy)
        with shoal.DHT(addresses(older), start=True) as third:
            for path, initial_peers in ((key, None), (copy, addresses(older)), (copy, addresses(third))):
                with pytest.raises(IdentityInUse) as caught:
                    shoal.DHT(initial_peers, start=True, identity_path=path)
                assert caught.value.address in addresses(older)[0]
            assert older.store("key", 1, shoal.get_dht_time() + 60)
            assert (third.get("key") or (None,))[0] == 1
    with shoal.DHT(start=True, identity_path=key) as again:
        assert again.peer_id == older.peer_id


def test_clients_with_one_key(tmp_path: Path) -> None:
    """Nobody can dial a client: the lock alone tells, and names the process."""
    key = tmp_path / "peer.key"
    with (
        shoal.DHT(start=True) as third,
        shoal.DHT(addresses(third), start=True, identity_path=key, client_mode=True) as older,
    ):
        with pytest.raises(IdentityInUse, match=f"process {older.background.pid} on "):
            shoal.DHT(addresses(third), start=True, identity_path=key, client_mode=True)
        shutil.copy(key, tmp_path / "copy.key")
        with pytest.raises(IdentityInUse, match="it is a client there"):
            shoal.DHT(addresses(third), start=True, identity_path=tmp_path / "copy.key", client_mode=True)


HOLDER = """
import shoal, sys, time
dht = shoal.DHT(start=True, identity_path=sys.argv[1])
print(flush=True)
time.sleep(60)
"""


def test_a_restart_after_kill_9(tmp_path: Path) -> None:
    key = str(tmp_path / "peer.key")
    with subprocess.Popen([sys.executable, "-c", HOLDER, key], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.kill()
    with shoal.DHT(start=True, identity_path=key) as again:
        assert again.is_alive()


@pytest.mark.sweep
def test_a_suspended_one_loses_its_identity_and_is_told(
    tmp_path: Path,
) -> None:
    key = tmp_path / "peer.key"
    with shoal.DHT(start=True) as third, shoal.DHT(addresses(third), start=True, identity_path=key) as older:
        os.kill(older.background.pid, signal.SIGSTOP)
        try:
            with shoal.DHT(addresses(third), start=True, identity_path=key) as newer:
                os.kill(older.background.pid, signal.SIGCONT)
                older.join(timeout=60)
                assert not older.is_alive()
                with pytest.raises(shoal.PeerProcessDied, match="another running peer has this identity"):
                    older.get("key")
                assert newer.store("key", 1, shoal.get_dht_time() + 60)
                assert (third.get("key", latest=True) or (None,))[0] == 1
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(older.background.pid, signal.SIGCONT)
