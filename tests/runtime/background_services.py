"""Services that the tests start in background processes. Imports nothing that such a process does not have anyway."""

from __future__ import annotations

import asyncio
import faulthandler
import inspect
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from shoal.runtime.memory import SharedMemory


class Runner:
    """Runs what it is told: ``(function, *arguments)``; ``async`` functions get the service first."""

    def __init__(self, context: Any, farewell: str | None = None) -> None:
        self.context = context
        self.events: dict[str, asyncio.Event] = {}
        self._farewell = farewell
        self.descriptors: Sequence[int] = ()

    def event(self, name: str) -> asyncio.Event:
        return self.events.setdefault(name, asyncio.Event())

    async def carry_out(self, command: Any, descriptors: Sequence[int]) -> object:
        function, *arguments = command
        self.descriptors = descriptors
        result = function(self, *arguments)
        return await result if inspect.iscoroutine(result) else result

    async def close(self) -> None:
        if self._farewell is not None:
            with open(self._farewell, "a") as file:  # noqa: ASYNC230
                file.write(f"{self.context.service_id}\n")


async def make_runner(context: Any) -> Runner:
    return Runner(context)


async def make_runner_with_farewell(path: str, context: Any) -> Runner:
    return Runner(context, path)


async def make_runner_with_birth_note(path: str, context: Any) -> Runner:
    with open(path, "w") as file:  # noqa: ASYNC230
        file.write("born\n")
    return Runner(context, path)


async def make_failing(context: Any) -> Runner:
    raise ConnectionRefusedError("nobody there")


async def make_stubborn_with_farewell(path: str, context: Any) -> Runner:
    def say() -> None:
        with open(path, "a") as file:
            file.write("goodbye\n")

    context.when_ending(say)
    return await make_stubborn(context)


async def make_stubborn(context: Any) -> Runner:
    class Stubborn(Runner):
        async def close(self) -> None:
            await asyncio.sleep(3600)

    return Stubborn(context)


def echo(service: Runner, value: object) -> object:
    return value


async def wait_for(service: Runner, name: str) -> str:
    await service.event(name).wait()
    return name


def set_event(service: Runner, name: str) -> None:
    service.event(name).set()


async def wait_for_cancellation(service: Runner) -> None:
    set_event(service, "waiting")
    try:
        await asyncio.sleep(3600)
    except asyncio.CancelledError:
        set_event(service, "cancelled")
        raise


async def note_why_cancelled(service: Runner, path: str) -> None:
    set_event(service, "waiting")
    try:
        await asyncio.sleep(3600)
    finally:
        with open(path, "w") as file:  # noqa: ASYNC230
            file.write("the service ends" if service.context.is_closing else "the call was cancelled")


def fail(service: Runner, error: BaseException) -> None:
    raise error


async def call_user(service: Runner, *commands: object) -> list[object]:
    return list(await asyncio.gather(*map(service.context.call_user, commands)))


async def call_user_and_cancel(service: Runner, command: object) -> str:
    task = asyncio.ensure_future(service.context.call_user(command))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    return "cancelled" if task.cancelled() else "not cancelled"


def evaluate(service: Runner, expression: str) -> object:
    return eval(expression, {**globals(), "service": service})


def add_one_to_memory(service: Runner, nbytes: int) -> None:
    with SharedMemory.from_descriptor(service.descriptors[0], nbytes) as memory:
        memory.buffer[nbytes - 1] += 1


async def add_one_to_memory_of_user(service: Runner, nbytes: int) -> object:
    answer = await service.context.call_user(nbytes)
    (descriptor,) = answer.take()
    with SharedMemory.from_descriptor(descriptor, nbytes) as memory:
        memory.buffer[nbytes - 1] += 1
    return answer.value


async def call_user_and_forget(service: Runner, command: object) -> None:
    await service.context.call_user(command)


def count_descriptors(service: Runner) -> int:
    return len(os.listdir("/dev/fd"))


class FailsToLoad:
    def __reduce__(self) -> Any:
        return _fail_to_load, ()


def _fail_to_load() -> Any:
    raise LookupError("it is not here")


def log(service: Runner, name: str, level: int, message: str, *arguments: object, **rest: Any) -> None:
    logging.getLogger(name).log(level, message, *arguments, **rest)


def log_with_traceback(service: Runner) -> None:
    try:
        raise LookupError("looked up")
    except LookupError:
        logging.getLogger("shoal.tests").exception("it failed")


def log_much(service: Runner, count: int) -> int:
    began = time.monotonic()
    for number in range(count):
        logging.getLogger("shoal.tests").info("%d %s", number, "x" * 1000)
    return round(time.monotonic() - began)


def print_lines(service: Runner) -> None:
    print("printed\nand more")
    print("complained", file=sys.stderr)
    os.write(2, b"from below Python\n")


def die(service: Runner, how: str) -> None:
    logging.getLogger("shoal.tests").warning("last words")
    if how == "exit":
        os._exit(3)
    if how == "segfault":
        faulthandler._sigsegv()  # type: ignore[attr-defined]
    os.kill(os.getpid(), 9)


def block_loop(service: Runner) -> None:
    while True:
        time.sleep(0.01)


async def call_function(service: Runner, function: Callable[[], object]) -> object:
    return function()


async def see_user_leave_and_return(service: Runner, folder: str) -> str:
    absence: str = await service.context.user.absent()
    with open(os.path.join(folder, "absent"), "w"):  # noqa: ASYNC230
        pass
    await service.context.user.present()
    return f"{absence} and is back"
