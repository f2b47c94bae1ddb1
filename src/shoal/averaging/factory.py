"""Makes an averager's service in the background process. Light: what it needs is imported without holding up the event
loop. Torch is needed, and imported, for codecs and halves only.
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

    :param setup: the pickled codecs of users, ``AveragerConfig`` and ``TensorSchema``; opaque, since unpickling codecs
      imports torch
    :param dht_service: name of the service that owns the DHT's node
    """
    await context.modules_ready()
    service_module = await asyncio.to_thread(importlib.import_module, "shoal.averaging.background.service")
    codecs, config, schema = await asyncio.to_thread(pickling.loads, setup)
    if codecs or not schema.is_plain:
        registry = await asyncio.to_thread(importlib.import_module, "shoal.compression.registry")
        for codec in codecs:
            registry.CODECS.adopt(codec)
    gc.freeze()  # what was imported stays: the collector need not look at it in each of its long runs
    service: Service = service_module.AveragerService(context, config, schema, dht_service)
    return service
