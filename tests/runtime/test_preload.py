"""Importing ahead of need in the background process."""

from __future__ import annotations

import asyncio
import linecache
import sys

from shoal.runtime.preload import Preload


def test_what_is_imported_ahead_is_there_and_leaves_no_sources_behind():
    """As torch does, which reads its own when it is imported."""

    async def main() -> None:
        preload = Preload(asyncio.get_running_loop())
        preload.names = ("no_such_module", "tabnanny")
        linecache.getlines(__file__)
        preload.start()
        await preload.finished()

    asyncio.run(main())
    assert "tabnanny" in sys.modules
    assert __file__ not in linecache.cache
