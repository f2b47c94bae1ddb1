"""The nodes of a DHT, each in its background process, by Shoal or by hivemind: stores and gets from nodes in turn."""

from __future__ import annotations

import importlib
import statistics
import time
from typing import Any

from benchmarks.workers.protocol import address_from_first, main, serve

STORED_FOR = 60.0
SETTLE = 1.0


class Nodes:
    def __init__(self, nodes: list[Any], operations: int) -> None:
        self._nodes = nodes
        self._operations = operations

    def prepare(self) -> None:
        time.sleep(SETTLE)

    def go(self) -> dict[str, Any]:
        stores, gets, lost, count = [], [], 0, len(self._nodes)
        for number in range(self._operations):
            value, key = time.time(), f"key {number}"
            began = time.perf_counter()
            stored = self._nodes[number % count].store(key, value, value + STORED_FOR)
            stores.append(time.perf_counter() - began)
            began = time.perf_counter()
            found = self._nodes[(number + count // 2) % count].get(key, latest=True)
            gets.append(time.perf_counter() - began)
            lost += not stored or found is None or found.value != value
        figures = {"store_ms": 1e3 * statistics.median(stores), "get_ms": 1e3 * statistics.median(gets)}
        return {
            "ok": self._operations - lost,
            "of": self._operations,
            "error": f"{lost} records were lost" if lost else "",
            "extra": figures,
        }

    def close(self) -> None:
        for node in self._nodes:
            node.shutdown()


def run(spec: dict[str, Any]) -> None:
    library = importlib.import_module(spec["library"])
    nodes: list[Any] = []
    seconds = []
    for _ in range(spec["nodes"]):
        initial = nodes[0].get_visible_maddrs() if nodes else None
        began = time.perf_counter()
        nodes.append(library.DHT(initial_peers=initial, start=True))
        seconds.append(time.perf_counter() - began)
    address_from_first(spec, lambda: [str(one) for one in nodes[0].get_visible_maddrs()])
    serve(Nodes(nodes, spec["operations"]), node_start_s=statistics.median(seconds))


if __name__ == "__main__":
    main(run)
