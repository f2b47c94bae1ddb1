"""Tensor codecs, beside hivemind's: bytes, errors and speed on one thread, as a table in Markdown.

    python benchmarks/tensor_codecs.py --hivemind-python /path/to/venv/bin/python

The other environment needs `pip install torch hivemind==1.1.12 bitsandbytes "numpy<2.4"` (hivemind's 8-bit codecs fail
with numpy 2.4). Without it, Shoal is measured alone. Both libraries encode the same float32 tensors, in processes of
their own that take turns `--repeat` times; figures are medians of all runs.

`part`: as many elements as take 512 KiB encoded, what an averager sends as one piece. `tensor`: 16 MB at once. Speeds
count bytes of float32. Shoal's are those of `encode` and `decode`, hivemind's those of `compress` and `extract`, which
are what each library does between a tensor and the socket.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch

CODECS = [
    "Float16Compression",
    "BFloat16Compression",
    "ScaledFloat16Compression",
    "Uniform8BitQuantization",
    "Quantile8BitQuantization",
    "BlockwiseQuantization",
]
PART_BYTES = 524_288
TENSOR_ELEMENTS = 4_000_000
RUNS = 7
FIGURES = {
    "bytes": "bytes / element",
    "rms": "RMS error",
    "max": "max error",
    "encode": "encode, MB/s",
    "decode": "decode, MB/s",
}
TIMEOUT = 600

Encode: TypeAlias = Callable[[torch.Tensor], Any]
Decode: TypeAlias = Callable[[Any, int], torch.Tensor]


def gradients(count: int) -> torch.Tensor:
    """Gradients of a small network on noise: layers of different magnitude, many values near zero."""
    torch.manual_seed(2)
    sizes = [256, 512, 1024, 1024, 512, 10]
    layers: list[torch.nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [torch.nn.Linear(inputs, outputs), torch.nn.ReLU()]
    network = torch.nn.Sequential(*layers[:-1])
    pieces: list[torch.Tensor] = []
    while sum(map(len, pieces)) < count:
        network.zero_grad()
        loss = torch.nn.functional.cross_entropy(network(torch.randn(64, 256)), torch.randint(10, (64,)))
        loss.backward()  # type: ignore[no-untyped-call]
        pieces += [p.grad.flatten().clone() for p in network.parameters() if p.grad is not None]
    return torch.cat(pieces)[:count].contiguous()


def tensors(count: int) -> Iterator[tuple[str, torch.Tensor]]:
    torch.manual_seed(1)
    normal = torch.randn(count)
    yield "normal", normal
    yield "student-t, 3", torch.distributions.StudentT(3.0).sample((count,))
    yield "gradients", gradients(count)
    yield "1 + 0.01 normal", 1 + 0.01 * normal


def elements_of_a_part(codec: str) -> int:
    return PART_BYTES // (2 if "16" in codec else 1) - (2048 if "8Bit" in codec or "Block" in codec else 16)


def coder(library: str, name: str) -> tuple[Encode, Decode]:
    codec = getattr(importlib.import_module(f"{library}.compression"), name)()
    if library == "shoal":
        return codec.encode, lambda data, count: codec.decode(data, torch.float32, count)
    base = importlib.import_module("hivemind.compression.base")
    return lambda tensor: codec.compress(
        tensor, base.CompressionInfo.from_tensor(tensor)
    ), lambda message, _: codec.extract(message)


def measure_one(library: str, name: str, tensor: torch.Tensor) -> dict[str, float]:
    encode, decode = coder(library, name)
    encode_seconds, decode_seconds = [], []
    for _ in range(RUNS + 1):  # the first one is cold
        began = time.perf_counter()
        encoded = encode(tensor)
        encoded_at = time.perf_counter()
        decoded = decode(encoded, len(tensor))
        encode_seconds.append(encoded_at - began)
        decode_seconds.append(time.perf_counter() - encoded_at)
    error = (decoded - tensor).double()
    megabytes = len(tensor) * 4 / 1e6
    return {
        "bytes": len(encoded if library == "shoal" else encoded.buffer) / len(tensor),
        "rms": error.square().mean().sqrt().item(),
        "max": error.abs().max().item(),
        "encode": megabytes / statistics.median(encode_seconds[1:]),
        "decode": megabytes / statistics.median(decode_seconds[1:]),
    }


def measure(library: str) -> None:
    """Print one line of JSON for each codec, distribution and size."""
    torch.set_num_threads(1)
    module = importlib.import_module(f"{library}.compression")
    for size in ("part", "tensor"):
        largest = dict(tensors(PART_BYTES if size == "part" else TENSOR_ELEMENTS))
        for name in CODECS:
            if not hasattr(module, name):
                continue
            for distribution, values in largest.items():
                tensor = values[: elements_of_a_part(name)] if size == "part" else values
                line = {"size": size, "codec": name, "distribution": distribution}
                print(json.dumps(line | measure_one(library, name, tensor)), flush=True)


def run(python: str, library: str) -> list[dict[str, Any]]:
    command = [python, "-W", "ignore", __file__, "--measure", library]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=TIMEOUT, check=False, env=environment
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def cell(figure: str, values: list[float]) -> str:
    """Shoal's median, and hivemind's if there is one."""
    form = {"bytes": "{:.4f}", "rms": "{:.2e}", "max": "{:.2e}"}.get(figure, "{:,.0f}")
    return " / ".join(form.format(value) for value in values)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hivemind-python", help="interpreter of the environment that has hivemind")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--measure", choices=["shoal", "hivemind"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure)
        return
    libraries = {"shoal": sys.executable}
    if options.hivemind_python:
        libraries["hivemind"] = options.hivemind_python
    samples: dict[tuple[str, str, str], dict[str, dict[str, list[float]]]] = {}
    for _ in range(options.repeat):
        for library, python in libraries.items():
            for line in run(python, library):
                key = (line["size"], line["codec"], line["distribution"])
                figures = samples.setdefault(key, {}).setdefault(library, defaultdict(list))
                for figure in FIGURES:
                    figures[figure].append(line[figure])
    print(f"{' / '.join(libraries)}, one thread, medians of {options.repeat} x {RUNS}\n")
    print("| size | codec | values |", " | ".join(FIGURES.values()), "|")
    print("|---|---|---|" + "---|" * len(FIGURES))
    for (size, codec, distribution), by_library in samples.items():
        medians = {
            figure: [statistics.median(by_library[name][figure]) for name in libraries if name in by_library]
            for figure in FIGURES
        }
        cells = " | ".join(cell(figure, values) for figure, values in medians.items())
        print(f"| {size} | {codec} | {distribution} | {cells} |")


if __name__ == "__main__":
    main()
