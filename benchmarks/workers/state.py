"""A donor of a state, or the joiner that downloads it, by Shoal or by hivemind."""

from __future__ import annotations

import importlib
import time
from typing import Any

import torch

from benchmarks.workers.protocol import address_from_first, main, serve

DOWNLOAD_TIMEOUT = 600
SETTLE = 3.0
"""Seconds until a donor's declaration is known, and its process has loaded torch."""


def make_state(floats: int) -> list[torch.Tensor]:
    """The same numbers at donor and joiner, so that the joiner can tell whether it got them."""
    torch.manual_seed(1)
    return [torch.randn(floats // 4) for _ in range(4)]


class Donor:
    def __init__(self, averager: Any) -> None:
        self._averager = averager

    def prepare(self) -> None:
        """Begin to share anew: each download includes the donor's copy of its state, which Shoal keeps for a minute."""
        self._averager.allow_state_sharing = False
        self._averager.allow_state_sharing = True
        time.sleep(SETTLE)

    def go(self) -> dict[str, Any]:
        return {"ok": 0, "of": 0}

    def close(self) -> None:
        self._averager.shutdown()


class Joiner:
    def __init__(self, averager: Any, expected: list[torch.Tensor]) -> None:
        self._averager = averager
        self._expected = expected

    def prepare(self) -> None:
        time.sleep(SETTLE)

    def go(self) -> dict[str, Any]:
        loaded = self._averager.load_state_from_peers(timeout=DOWNLOAD_TIMEOUT)
        ended = time.monotonic()
        right = loaded is not None and all(map(torch.equal, loaded[1], self._expected))
        return {
            "ended": ended,
            "ok": int(right),
            "of": 1,
            "error": "" if right else "no state, or a wrong one",
        }

    def close(self) -> None:
        self._averager.shutdown()


def run(spec: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    library = importlib.import_module(spec["library"])
    importlib.import_module(f"{spec['library']}.averaging")
    listen = {"host_maddrs": [f"/ip4/{spec['ip']}/tcp/0"], "start": True}
    state, is_donor = make_state(spec["floats"]), spec["host"] == 0
    if is_donor:
        dht = library.DHT(**listen)
        address_from_first(spec, lambda: [str(one) for one in dht.get_visible_maddrs()])
    else:
        dht = library.DHT(initial_peers=address_from_first(spec, list), **listen)
    averager = library.averaging.DecentralizedAverager(
        state if is_donor else [torch.zeros(1)],
        dht,
        prefix="bench",
        target_group_size=2,
        min_matchmaking_time=2.0,
        request_timeout=1.0,
        allow_state_sharing=is_donor,
        start=True,
    )
    serve(Donor(averager) if is_donor else Joiner(averager, state))


if __name__ == "__main__":
    main(run)
