"""How peers are reached: this host by others, and others by this host.

This host: :mod:`.reachability` is the answer as one value, :mod:`.dialback` what helpers say and how that is judged,
:mod:`.vantage` from where they look. :mod:`.inquiry` asks them, :mod:`.helper` answers others, :mod:`.watch` decides
when to ask again. Others: :mod:`.addresses` is the book of what is known of them, :mod:`.routes` how to go there.
"""
