"""Background tasks with an owner: :class:`TaskSet` sees each of them fail, and ends them all."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")


class TaskSet:
    """Tasks that go on beside their starter, until they are done or :meth:`close`.

    A failure that the task's own code did not expect is a bug: it is logged with its traceback, and the others go on.
    """

    def __init__(self) -> None:
        # A dictionary, for its order: tasks are cancelled in the order in which they were started.
        self._tasks: dict[asyncio.Task[Any], None] = {}
        self._closed = False

    def start(self, coroutine: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Run a coroutine as a task of this set."""
        task = asyncio.get_running_loop().create_task(coroutine, name=name)
        if self._closed:
            task.cancel()
        self.adopt(task)
        return task

    def adopt(self, task: asyncio.Task[Any]) -> None:
        """Take over a task that was started elsewhere."""
        self._tasks[task] = None
        task.add_done_callback(self._done)

    async def close(self) -> None:
        """Cancel all tasks and wait for their end."""
        self._closed = True
        while self._tasks:
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("task %s failed, which is a bug", task.get_name(), exc_info=error)
