"""How far a swarm is in its epoch: each peer says what it has done, and all forecast the same end from it.

:mod:`.values` are the values, :mod:`.forecast`, :mod:`.agenda` and :mod:`.shards` the rules, all pure. :mod:`.records`
stores and reads in the DHT's process; :mod:`.tracker` is what an optimizer holds.
"""
