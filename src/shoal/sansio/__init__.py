"""What every deciding core and its shell have in common: one contract, one state machine, one driver.

A *core* decides and does nothing: :meth:`Core.handle` takes an event and the time, and returns effects.
:attr:`Core.deadline` says when it wants to hear that time has passed. A *driver* owns the core's timer and its queue of
events, has the effects carried out, and shows each turn to those who watch.

- :mod:`.core`: the contract. Pure.
- :mod:`.machine`: states, one table of transitions, and the history that an illegal one tells. Pure.
- :mod:`.driver`: the asyncio side.
- :mod:`.trace`: the turns of all drivers of this process, for reports, tests and monitors.
"""
