"""Makes an averager's service in the background process. Light: torch is imported without holding up the
event loop.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
from typing import TYPE_CHECKING

from shoal.runtime import pickling

if TYPE_CHECKING:
    from shoal.runtime.service import Service, ServiceContext


async def create_averager_service(setup: bytes, dht_service: str, context: ServiceContext) -> Service:
    """The factory that the user process sends by reference.

    :param setup: the pickled codecs of users, ``AveragerConfig`` and ``TensorSchema``; opaque, since unpickling them
      imports torch
    :param dht_service: name of the service that owns the DHT's node
    """
    await context.modules_ready()
    service_module = await asyncio.to_thread(importlib.import_module, "shoal.averaging.background.service")
    # Parts fit into the cache and are worked on as they come: handing them to other threads costs more than it
    # gains, and far more where the trainer keeps every core busy.
    torch = importlib.import_module("torch")
    torch.set_num_threads(1)
    gc.freeze()  # what was imported stays: the collector need not look at it in each of its long runs
    codecs, config, schema = await asyncio.to_thread(pickling.loads, setup)
    registry = importlib.import_module("shoal.compression.registry")
    for codec in codecs:
        registry.CODECS.adopt(codec)
    service: Service = service_module.AveragerService(context, config, schema, dht_service)
    return service
