"""Shoal beside hivemind, Gloo and raw TCP: run as ``python -m benchmarks``, or by ``make bench``.

- :mod:`.rows` is the table: what is measured, which sides take part, and what Shoal is required to reach.
- :mod:`.work`, :mod:`.figures`, :mod:`.requirements`, :mod:`.medians` and :mod:`.rendering` are pure.
- :mod:`.launches` says which programs of :mod:`.workers` do a piece of work, and :mod:`.runner` has them do it.
- :mod:`.network` makes long links of network namespaces.

``adaptive_timeouts.py`` and ``tensor_codecs.py`` are programs of their own.
"""
