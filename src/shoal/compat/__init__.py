"""Names of hivemind, for programs that were written for it. No other module mentions a name that only hivemind has.

- :mod:`~shoal.compat.modules` lists the modules of hivemind, and the names that each has there.
- :mod:`~shoal.compat.advice` says what to use in place of a name that Shoal does not have.
- :mod:`~shoal.compat.finder` gives Shoal's modules and classes these names and this advice when they are imported.
- :mod:`~shoal.compat.overriding` refuses subclasses whose methods only hivemind would call.
- :mod:`~shoal.compat.dht_options` knows the options of hivemind's DHT that Shoal ignores or refuses.
- :mod:`~shoal.compat.logs` has the function that chooses hivemind's log handler.

This package is the lowest layer but for the errors: it imports nothing else of Shoal. What it hands out it finds when a
program asks for it.
"""
