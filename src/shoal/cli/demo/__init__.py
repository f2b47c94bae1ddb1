"""``shoal demo``: a swarm of training processes on this machine, one of which is killed and replaced.

Theory of operation. The terminal's process (:mod:`supervisor`) runs a DHT node, starts one process per peer
(:mod:`worker`) and watches them through pipes (:mod:`protocol`). The peers find each other through the DHT, train
on data of their own (:mod:`data`, :mod:`training`) and average with :class:`shoal.DecentralizedAverager`; no
tensor passes through the supervisor. What peers tell about themselves is also stored in the DHT (:mod:`board`),
so that a terminal sees peers that another one has started.
"""
