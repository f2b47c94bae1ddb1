"""Makes the DHT's service in the background process; the user process can name it without loading the node."""

from __future__ import annotations

import asyncio
import importlib
from typing import TYPE_CHECKING

from shoal.dht.commands import DHTSetup

if TYPE_CHECKING:
    from shoal.dht.service import DHTService
    from shoal.runtime.service import ServiceContext


async def make_service(setup: DHTSetup, context: ServiceContext) -> DHTService:
    """See :func:`shoal.dht.service.create_dht_service`."""
    module = await asyncio.to_thread(importlib.import_module, "shoal.dht.service")
    service: DHTService = await module.create_dht_service(setup, context)
    return service
