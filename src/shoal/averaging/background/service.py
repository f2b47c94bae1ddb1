"""The averager in the background process: takes the user's commands, and hands each to the part that carries it out."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from shoal.averaging.allreduce.deadlines import Deadlines
from shoal.averaging.allreduce.round import RoundTimeouts
from shoal.averaging.allreduce.rounds import Rounds
from shoal.averaging.background.arena import SharedArena
from shoal.averaging.background.division import Division
from shoal.averaging.background.doubts import Doubts
from shoal.averaging.background.resources import Resources
from shoal.averaging.background.slow_peers import SlowPeers
from shoal.averaging.background.state_sharing import StateService
from shoal.averaging.background.step_runner import StepRunner
from shoal.averaging.commands import (
    AllowAllreduce,
    AttachArena,
    AverageWritten,
    AwaitEnd,
    GetGroupBits,
    Reschedule,
    RunStep,
    SetGroupBits,
)
from shoal.averaging.config import AveragerConfig
from shoal.averaging.matchmaking.matchmaker import Matchmaker
from shoal.averaging.partition import Layout
from shoal.averaging.router import Router
from shoal.averaging.schema import TensorSchema
from shoal.averaging.state_commands import StateCommand
from shoal.dht.node import DHTNode
from shoal.dht.service import DHTService
from shoal.errors import InvalidStateError
from shoal.runtime.service import ServiceContext


class AveragerService:
    """Carries out the commands of one averager; see :mod:`.commands`."""

    def __init__(
        self, context: ServiceContext, config: AveragerConfig, schema: TensorSchema, dht_service: str
    ) -> None:
        dht = context.find(dht_service)
        if not isinstance(dht, DHTService):
            raise InvalidStateError(f"service {dht_service!r} is no DHT")
        router = Router.of(dht.node.host)
        layout = Layout.from_schema(schema)
        self._arena = SharedArena(layout)
        self._rounds = Rounds(router, config.prefix, sender_timeout=config.effective_sender_timeout)
        self._matchmaker = _make_matchmaker(dht.node, router, config, schema)
        self._states = StateService(
            context,
            dht.node,
            router,
            config.prefix,
            declare_period=config.declare_state_period,
            next_chunk_timeout=config.next_chunk_timeout,
            max_state_age=config.max_state_age,
        )
        timeouts = RoundTimeouts.of(
            config.allreduce_timeout,
            config.effective_sender_timeout,
            config.effective_reducer_timeout,
            config.each_part,
        )
        self._doubts = Doubts(context, dht.node.host, config.prefix)
        self._steps = StepRunner(
            Resources(
                context=context,
                config=config,
                node=dht.node,
                matchmaker=self._matchmaker,
                rounds=self._rounds,
                timeouts=timeouts,
                deadlines=Deadlines(timeouts) if config.adaptive_timeouts else None,
                division=Division(
                    layout, part_size_bytes=config.part_size_bytes, min_vector_size=config.min_vector_size
                ),
                arena=self._arena,
                slow_peers=SlowPeers(config.prefix),
                doubts=self._doubts,
            )
        )

    async def carry_out(self, command: object, descriptors: Sequence[int]) -> object:
        match command:
            case RunStep():
                return await self._steps.run(command)
            case AllowAllreduce(step):
                self._steps.trigger(step)
            case AwaitEnd(step):
                await self._steps.ended(step)
            case Reschedule(step, scheduled_time):
                self._steps.reschedule(step, scheduled_time)
            case AverageWritten():
                self._arena.is_free.set()
            case GetGroupBits():
                return self._matchmaker.bits
            case SetGroupBits(bits):
                self._matchmaker.set_bits(bits)
            case StateCommand():
                return await self._states.carry_out(command)
            case AttachArena(nbytes, holds_values):
                (descriptor,) = descriptors
                self._arena.attach(nbytes, descriptor, holds_values=holds_values)
                self._states.start()
            case _:
                raise InvalidStateError(f"an averager has no command {type(command).__name__}")
        return None

    async def close(self) -> None:
        # Peers that ask from now on are refused at once, and do not wait for what follows.
        self._rounds.close()
        await asyncio.gather(self._matchmaker.close(), self._states.close(), self._doubts.close())
        await self._arena.close()


def _make_matchmaker(
    node: DHTNode, router: Router, config: AveragerConfig, schema: TensorSchema
) -> Matchmaker:
    agreement = schema.agreement(
        config.part_size_bytes, config.matchmaking.min_group_size, config.min_vector_size
    )
    return Matchmaker(
        node,
        router,
        prefix=config.prefix,
        schema_hash=agreement.digest(),
        agreement=agreement,
        config=config.matchmaking,
        mode=config.mode,
        bandwidth=config.bandwidth,
        initial_bits=config.initial_group_bits,
    )
