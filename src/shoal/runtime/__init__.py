"""The background process, its private channel to the user process, shared memory and log forwarding.

Knows neither DHT nor averaging: those are services, made in the process by factories that the user process sends. The
user's side is :mod:`shoal.runtime.process`; the process's own is :mod:`shoal.runtime.server`, entered by
:mod:`shoal.runtime.child`. Names are imported from the modules, so that each side loads only its own half.
"""
