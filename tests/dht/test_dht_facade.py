"""The DHT as users hold it: real background processes, real sockets."""

from __future__ import annotations

import asyncio
import concurrent.futures
import copy
import inspect
import pickle
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import shoal
from shoal import DHT, get_dht_time
from shoal.compat.dht_options import LIBP2P_OPTIONS
from shoal.dht.options import make_config
from shoal.errors import (
    BootstrapError,
    DeadlineExceeded,
    InvalidStateError,
    InvalidTypeError,
    InvalidValueError,
    PeerProcessDied,
)

LIMIT = 30


@pytest.fixture(scope="module")
def pair():
    """Two nodes of one DHT."""
    with DHT(start=True) as first, DHT([str(a) for a in first.get_visible_maddrs()], start=True) as second:
        yield first, second


def soon() -> float:
    return get_dht_time() + 60


# Records


@pytest.mark.parametrize(
    "value",
    [None, True, 7, 2.5, "text", b"bytes", (1, "two"), [1, (2, [3])], {"a": 1, ("t", 1): (2,)}],
    ids=repr,
)
def test_values_keep_their_types(pair, value):
    first, second = pair
    key = ("values", repr(value))
    expiration = soon()
    assert first.store(key, value, expiration) is True
    found = second.get(key, latest=True)
    assert found == (value, expiration)
    assert type(found.value) is type(value)
    assert found.expiration_time == expiration


def test_sub_keys_merge(pair):
    first, second = pair
    assert first.store("dictionary", 1, soon(), subkey="one")
    assert second.store("dictionary", (2,), soon(), subkey=("two", 2))
    found = first.get("dictionary", latest=True)
    assert {subkey: entry.value for subkey, entry in found.value.items()} == {"one": 1, ("two", 2): (2,)}


def test_the_later_expiration_wins(pair):
    first, second = pair
    now = get_dht_time()
    assert first.store("wins", "later", now + 50)
    assert second.store("wins", "earlier", now + 40) is False
    assert second.get("wins", latest=True).value == "later"


def test_what_is_not_there_is_none(pair):
    assert pair[0].get("nobody stored this") is None


def test_futures_can_be_waited_for_and_awaited(pair):
    first, second = pair
    stored = first.store("future", 1, soon(), return_future=True)
    assert isinstance(stored, concurrent.futures.Future)
    assert stored.result(LIMIT) is True

    async def main():
        return await second.get("future", latest=True, return_future=True)

    assert asyncio.run(main()).value == 1


def test_classes_of_the_user_can_be_stored(pair):
    @shoal.MSGPackSerializer.ext_serializable(0x33)
    class Point:
        def __init__(self, x: int) -> None:
            self.x = x

        def packb(self) -> bytes:
            return bytes([self.x])

        @classmethod
        def unpackb(cls, raw: bytes) -> Point:
            return cls(raw[0])

    first, second = pair
    assert first.store("point", [Point(3)], soon())
    (point,) = second.get("point", latest=True).value
    assert (type(point), point.x) == (Point, 3)


@pytest.mark.parametrize("place", ["key", "value", "subkey"])
def test_what_cannot_be_serialized_is_a_type_error(pair, place):
    arguments = {"key": "k", "value": 1, "subkey": None, place: threading.Lock()}
    with pytest.raises(TypeError, match=rf"{place}: .*_thread.lock"):
        pair[0].store(expiration_time=soon(), **arguments)
    if place == "key":
        with pytest.raises(TypeError, match="key: "):
            pair[0].get(threading.Lock())


@pytest.mark.parametrize(
    ("expiration", "error"), [("soon", TypeError), (float("nan"), ValueError), (float("inf"), ValueError)]
)
def test_bad_expiration_times(pair, expiration, error):
    with pytest.raises(error, match="expiration_time"):
        pair[0].store("k", 1, expiration)


def test_an_expiration_too_far_ahead_is_refused(pair):
    with pytest.raises(ValueError, match="max_expiration"):
        pair[0].store("k", 1, get_dht_time() + 1e6)


# Properties


def test_names_and_addresses(pair):
    first, second = pair
    assert str(first.peer_id).startswith("12D3KooW")
    assert first.peer_id != second.peer_id
    (address,) = first.get_visible_maddrs()
    assert str(address).startswith("/ip4/127.0.0.1/tcp/")
    assert str(address).endswith(f"/p2p/{first.peer_id}")
    assert first.get_visible_maddrs(latest=True) == [address]
    assert first.client_mode is False
    assert [str(peer) for peer in second.initial_peers] == [str(address)]
    assert repr(first) == f"<DHT {first.peer_id}, alive>"


def test_client_mode(pair):
    with DHT(pair[0].get_visible_maddrs(), start=True, client_mode=True) as client:
        assert client.client_mode is True
        assert client.get_visible_maddrs() == []
        assert client.store("from a client", 1, soon())
        assert pair[1].get("from a client", latest=True).value == 1
    assert client.client_mode is True, "as it was"


def test_an_identity_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with DHT(start=True, identity_path="node.key") as first:
        peer_id = first.peer_id
    assert (tmp_path / "node.key").stat().st_mode & 0o777 == 0o600
    with DHT(start=True, identity_path=tmp_path / "node.key") as second:
        assert second.peer_id == peer_id


# Code of users


def make_coroutine(word: str):
    async def coroutine(dht, node):
        await node.store(word, dht.peer_id.to_bytes(), shoal.get_dht_time() + 60)
        return word, dht.peer_id == node.peer_id, dht.client_mode, dht.get_visible_maddrs()

    return coroutine


def test_run_coroutine(pair):
    first, second = pair
    assert first.run_coroutine(make_coroutine("by value")) == (
        "by value",
        True,
        False,
        first.get_visible_maddrs(),
    )
    assert second.get("by value", latest=True).value == first.peer_id.to_bytes()
    future = first.run_coroutine(lambda dht, node: asyncio.sleep(0, "lambda"), return_future=True)
    assert future.result(LIMIT) == "lambda"


def test_run_coroutine_can_be_cancelled_and_may_fail(pair):
    async def forever(dht, node):
        await asyncio.sleep(3600)

    async def fail(dht, node):
        raise LookupError("in the coroutine")

    future = pair[0].run_coroutine(forever, return_future=True)
    assert future.cancel()
    with pytest.raises(LookupError, match="in the coroutine"):
        pair[0].run_coroutine(fail)
    assert pair[0].is_alive()


def test_run_coroutine_says_what_cannot_be_sent(pair):
    guard = threading.Lock()

    async def coroutine(dht, node):
        return guard

    with pytest.raises(TypeError, match=r"coroutine.*variable 'guard' \(_thread.lock\)"):
        pair[0].run_coroutine(coroutine)
    with pytest.raises(TypeError, match="async def"):
        pair[0].run_coroutine("not callable")
    with pytest.raises(TypeError, match="async def"):
        pair[0].run_coroutine(lambda dht, node: 1)
    own = pair[0]
    with pytest.raises(TypeError, match=r"variable 'own' .*a DHT cannot be pickled or copied.*initial_peers"):
        pair[0].run_coroutine(lambda dht, node: own)

    class Own(shoal.RecordValidatorBase):
        def validate(self, record) -> bool:
            return own is not None

    with pytest.raises(
        TypeError, match=r"record_validators cannot.*Own.*its method 'validate'.*variable 'own'"
    ):
        pair[0].add_validators([Own()])


class RefuseSevens(shoal.RecordValidatorBase):
    def validate(self, record) -> bool:
        return shoal.MSGPackSerializer.loads(record.value) != 7


def test_validators_of_the_user(pair):
    with DHT(start=True, record_validators=[RefuseSevens()]) as strict:
        assert strict.store("k", 8, soon()) is True
        assert strict.store("k", 7, soon() + 5) is False
        # A node without the validator stores it; the strict one does not believe it.
        assert strict.get("k", latest=True).value == 8
    with DHT(start=True) as node:
        assert node.store("k", 7, soon()) is True
        node.add_validators([RefuseSevens()])
        assert node.store("k", 7, soon() + 5) is False


# Parameters


def test_the_signature_is_the_promised_one():
    parameters = inspect.signature(DHT).parameters
    assert next(iter(parameters)) == "initial_peers"
    keywords = "start daemon record_validators shutdown_timeout await_ready host_maddrs announce_maddrs identity_path "
    keywords += (
        "client_mode bootstrap_timeout ensure_bootstrap_success num_replicas bucket_size parallel_rpc "
    )
    keywords += "wait_timeout refresh_timeout cache_locally cache_nearest cache_size cache_on_store"
    for name in keywords.split():
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
    assert parameters["daemon"].default is True
    assert parameters["shutdown_timeout"].default == 3


@pytest.fixture
def no_process(monkeypatch):
    """Fails if a process is started all the same."""

    def start(*arguments: object, **options: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr("shoal.runtime.process.BackgroundProcess.start", start)


@pytest.mark.usefixtures("no_process")
@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"initial_peers": "127.0.0.1:80"}, ValueError, "initial_peers: .*'127.0.0.1:80'"),
        (
            {"initial_peers": ""},
            ValueError,
            "initial_peers: '' holds no address.* or None to begin a new DHT",
        ),
        ({"initial_peers": ["", " \n"]}, ValueError, "initial_peers: .* holds no address"),
        (
            {"initial_peers": ["/ip4/127.0.0.1/udp/1"]},
            ValueError,
            "(?s)initial_peers: .*'udp'.*TCP alone.*Give /ip4",
        ),
        ({"initial_peers": {"a": 1}}, TypeError, "initial_peers must be a list of addresses"),
        ({"host_maddrs": "/ip4/0.0.0.0/udp/0/quic"}, ValueError, "(?s)host_maddrs: .*'quic'"),
        ({"initial_peers": [7]}, TypeError, "initial_peers.*7"),
        ({"initial_peers": 7}, TypeError, "initial_peers.*7"),
        ({"host_maddrs": []}, ValueError, "client_mode=True"),
        ({"host_maddrs": ["/ip4/300.0.0.1/tcp/0"]}, ValueError, "300.0.0.1"),
        ({"announce_maddrs": ["/ip4/0.0.0.0/tcp/1"]}, ValueError, "announce_maddrs"),
        ({"announce_maddrs": ["/ip4/1.2.3.4/tcp/0"]}, ValueError, "announce_maddrs"),
        ({"announce_maddrs": [f"/ip4/1.2.3.4/tcp/{n}" for n in range(1, 18)]}, ValueError, "at most 16"),
        ({"stall_timeout": -1}, ValueError, "stall_timeout"),
        ({"max_value_size": 1 << 20}, ValueError, "max_value_size.*one message"),
        ({"identity_path": 7}, TypeError, "identity_path"),
        ({"client_mode": 1}, TypeError, "client_mode"),
        ({"daemon": "yes"}, TypeError, "daemon"),
        ({"shutdown_timeout": -1}, ValueError, "shutdown_timeout"),
        ({"bootstrap_timeout": "long"}, TypeError, "bootstrap_timeout"),
        ({"num_replicas": 0}, ValueError, "num_replicas"),
        ({"num_replicas": 2.5}, TypeError, "num_replicas"),
        ({"cache_on_store": 3}, TypeError, "cache_on_store"),
        ({"record_validators": [object()]}, TypeError, "record_validators"),
        ({"record_validators": 7}, TypeError, "record_validators"),
        ({"num_replica": 5}, TypeError, "'num_replica'; did you mean 'num_replicas'"),
        ({"initial_peer": []}, TypeError, "did you mean 'initial_peers'"),
        ({"zzz": 1}, TypeError, "unknown option 'zzz'$"),
        ({"authorizer": object()}, TypeError, "authorizer"),
        ({"p2p": object()}, TypeError, "'p2p' is not supported"),
    ],
    ids=lambda value: next(iter(value.items()))[0] if isinstance(value, dict) else "",
)
def test_bad_parameters_are_refused_before_anything_starts(options, error, says):
    with pytest.raises(error, match=says) as caught:
        DHT(start=True, **options)
    assert isinstance(caught.value, shoal.ShoalError)


@pytest.mark.usefixtures("no_process")
def test_a_damaged_identity_is_refused_before_anything_starts(tmp_path):
    path = tmp_path / "key"
    path.write_bytes(b"no key")
    path.chmod(0o600)
    with pytest.raises(InvalidValueError, match=str(path)):
        DHT(start=True, identity_path=path)


@pytest.mark.parametrize("name", sorted(LIBP2P_OPTIONS))
def test_options_of_the_libp2p_daemon_give_one_warning(name):
    with pytest.warns(UserWarning, match=f"{name!r} is ignored") as caught:
        DHT(start=False, **{name: True})
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_options_of_the_configuration_are_taken():
    options = {"max_expiration": 7200, "check_reachability": False, "stall_timeout": None}
    with DHT(start=True, **options) as dht:
        assert dht.store("k", 1, get_dht_time() + 7000)


def test_numbers_of_numpy_are_taken_as_pythons_own():
    options = {"parallel_rpc": np.int64(4), "wait_timeout": np.float32(2.5), "cache_locally": np.bool_(True)}
    config = make_config(options, {"max_expiration": np.int32(7200)})
    given = (config.parallel_rpc, config.wait_timeout, config.cache_locally, config.max_expiration)
    assert given == (4, 2.5, True, 7200)
    assert [type(value) for value in given] == [int, float, bool, int]


# Life


def test_it_can_be_started_later():
    dht = DHT(start=False)
    assert not dht.is_alive()
    assert "not started" in repr(dht)
    dht.shutdown()
    with pytest.raises(InvalidStateError, match="not started"):
        dht.get("k")
    dht.run_in_background(await_ready=False)
    dht.wait_until_ready(LIMIT)
    assert dht.is_alive()
    assert dht.get("k") is None
    with pytest.raises(InvalidStateError, match="started before"):
        dht.run_in_background()
    peer_id = dht.peer_id
    dht.shutdown()
    dht.shutdown()
    assert not dht.is_alive()
    assert "ended" in repr(dht)
    assert (dht.peer_id, dht.client_mode) == (peer_id, False)
    with pytest.raises(InvalidStateError, match="shut down"):
        dht.get("k")
    with pytest.raises(InvalidStateError, match="started before"):
        dht.run_in_background()


def test_what_an_averager_was_told_while_the_node_was_alive_is_known_after_its_end():
    dht = DHT(start=True, await_ready=False)
    assert dht._describe_later().result(LIMIT).client_mode is False
    dht.shutdown()
    assert dht.client_mode is False
    assert str(dht.peer_id) in repr(dht)


def test_of_a_node_that_never_was_ready_nothing_is_known():
    address = f"/ip4/127.0.0.1/tcp/{closed_port()}"
    dht = DHT(
        [address], start=True, await_ready=False, ensure_bootstrap_success=False, bootstrap_timeout=LIMIT
    )
    dht.shutdown()
    for name in ("peer_id", "client_mode"):
        with pytest.raises((InvalidStateError, concurrent.futures.CancelledError)):
            getattr(dht, name)


def test_a_port_in_use_is_a_clear_error_at_once():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"/ip4/127.0.0.1/tcp/{taken.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(InvalidValueError, match=f"cannot listen on {address}: Address already in use"):
            DHT(start=True, host_maddrs=[address])
        assert time.monotonic() - began < LIMIT / 2


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_nobody_there_lists_each_address(pair):
    refused = f"/ip4/127.0.0.1/tcp/{closed_port()}"
    address = pair[0].get_visible_maddrs()[0]
    somebody_else = str(address.with_peer_id(pair[1].peer_id))
    with pytest.raises(BootstrapError) as caught:
        DHT([refused, somebody_else], start=True, bootstrap_timeout=0.5)
    assert set(caught.value.failures) == {refused, somebody_else}
    assert "refused" in caught.value.failures[refused]
    assert f"{pair[1].peer_id} was expected" in caught.value.failures[somebody_else]


def test_waiting_has_an_end_and_failures_come_later_too():
    dht = DHT([f"/ip4/127.0.0.1/tcp/{closed_port()}"], start=True, await_ready=False, bootstrap_timeout=1)
    with pytest.raises(DeadlineExceeded, match="not ready after"):
        dht.wait_until_ready(timeout=0.05)
    with pytest.raises(BootstrapError):
        dht.get("k")
    assert dht.background.wait(LIMIT)
    with pytest.raises(BootstrapError):
        dht.wait_until_ready()
    slow = DHT([f"/ip4/127.0.0.1/tcp/{closed_port()}"], start=False, bootstrap_timeout=60)
    with pytest.raises(DeadlineExceeded):
        slow.run_in_background(timeout=0.05)
    assert not slow.is_alive()


def test_futures_come_at_once_while_the_node_is_not_ready(monkeypatch):
    with socket.socket() as silent:  # takes connections and never answers: the node waits for it
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"/ip4/127.0.0.1/tcp/{silent.getsockname()[1]}"
        options = {"start": True, "await_ready": False, "ensure_bootstrap_success": False}
        with DHT([address], bootstrap_timeout=3, **options) as dht:

            @shoal.MSGPackSerializer.ext_serializable(0x34)
            class Point:
                def packb(self) -> bytes:
                    return b""

                @classmethod
                def unpackb(cls, raw: bytes) -> Point:
                    return cls()

            monkeypatch.setattr(Point, "__module__", "__main__")  # sent by value
            stored = dht.store("early", Point(), soon(), return_future=True)
            got = dht.get("never stored", return_future=True)
            ran = dht.run_coroutine(make_coroutine("early coroutine"), return_future=True)
            dropped = dht.store("dropped", 1, soon(), return_future=True)
            assert not dht._link.creation.done(), "they came before the node was ready"
            assert dropped.cancel()
            assert dropped.cancelled()

            async def main():
                return await got

            assert stored.result(LIMIT) is True
            assert asyncio.run(main()) is None
            assert ran.result(LIMIT)[0] == "early coroutine"
            assert type(dht.get("early").value) is Point
            assert dht.get("dropped") is None


def test_early_futures_tell_that_the_node_could_not_be_made():
    dht = DHT([f"/ip4/127.0.0.1/tcp/{closed_port()}"], start=True, await_ready=False, bootstrap_timeout=1)
    early = dht.get("k", return_future=True)
    with pytest.raises(BootstrapError):
        early.result(LIMIT)
    with pytest.raises(BootstrapError):
        dht.store("k", 1, soon(), return_future=True).result(LIMIT)


def test_it_may_start_without_the_others():
    address = f"/ip4/127.0.0.1/tcp/{closed_port()}"
    options = {"bootstrap_timeout": 0.2, "ensure_bootstrap_success": False}
    with DHT([address], start=True, **options) as early, DHT(start=True, host_maddrs=[address]) as late:
        assert late.store("k", 1, soon())
        deadline = time.monotonic() + LIMIT
        while early.get("k", latest=True) is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_death_of_its_process(pair):
    dht = DHT(start=True)

    async def forever(dht, node):
        await asyncio.sleep(3600)

    waiting = dht.run_coroutine(forever, return_future=True)

    async def die(dht, node):
        import os
        import signal

        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(PeerProcessDied, match="SIGKILL"):
        dht.run_coroutine(die)
    with pytest.raises(PeerProcessDied, match="SIGKILL"):
        waiting.result(LIMIT)
    with pytest.raises(PeerProcessDied, match="SIGKILL"):
        dht.get("k")
    assert not dht.is_alive()
    assert str(dht.peer_id) in repr(dht)
    assert dht.client_mode is False
    dht.shutdown()


@pytest.mark.parametrize("copier", [pickle.dumps, copy.copy, copy.deepcopy])
def test_it_cannot_be_pickled_or_copied(pair, copier):
    with pytest.raises(InvalidTypeError, match=r"get_visible_maddrs\(\)"):
        copier(pair[0])


LOADS = """
import sys
from shoal import DHT

async def loaded(dht, node):
    import sys
    return {name.partition(".")[0] for name in sys.modules}

with DHT(start=True) as dht:
    # cloudpickle is there because this very function is sent by value.
    there = dht.run_coroutine(loaded)
here = {name.partition(".")[0] for name in sys.modules}
assert "cryptography" in there and "shoal" in here  # the names are those of packages
print(sorted({"torch", "numpy", "pydantic", "rich", "typer", "IPython"} & (there | here)))
"""


def test_neither_a_dht_s_process_nor_its_host_loads_torch_or_numpy():
    # In an interpreter of its own: a host that has loaded torch already has the process load it too.
    ended = subprocess.run(
        [sys.executable, "-c", LOADS], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stdout) == (0, "[]\n"), ended.stderr


def test_a_class_that_cannot_be_sent_is_refused_each_time(monkeypatch):
    """And not taken for known by calls that follow, or that another thread makes meanwhile."""
    with DHT(start=True) as dht:

        class Local:
            handle = threading.Lock()

            def packb(self):
                return b""

            @classmethod
            def unpackb(cls, raw):
                return cls()

        monkeypatch.setattr(shoal.MSGPackSerializer, "_class_of", {0x55: Local})
        for _ in range(2):
            with pytest.raises(TypeError, match="a registered class"):
                dht.store("key", 1, get_dht_time() + 10)
