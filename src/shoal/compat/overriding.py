"""What a subclass of :class:`~shoal.DecentralizedAverager` cannot override: methods by which hivemind's averager may be
changed, and which nothing calls here, since rounds run in another process by a protocol of Shoal's own.

A subclass that defines one would be silently ignored, so that its class statement is an error. Everything public may be
overridden, and names of one's own are safe: what the averager keeps to itself has names that are mangled by its class.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from shoal.errors import InvalidTypeError

_REDUCTION = (
    "change the tensors under get_tensors() before step() and after it, give step(weight=...) or a codec of your own "
    "(compression=...); what needs two phases takes two averagers with a prefix each"
)
_BACKGROUND = (
    "run code in the background process with dht.run_coroutine(); rename a method of your own that you call"
)
_CALLS = (
    "serve and make calls of your own with node.host.serve() and node.host.call() inside dht.run_coroutine()"
)
_GROUPS = "groups are formed by Shoal's own protocol; set_group_bits() and the group sizes steer it"
_DECLARING = (
    "allow_state_sharing, state_sharing_priority and declare_state_period say what is declared, and when"
)

_RPC = "rpc_"

INSTEAD: Mapping[str, str] = {
    "_aggregate_with_group": _REDUCTION,
    "_run_allreduce_inplace_": _REDUCTION,
    "_register_allreduce_group": _REDUCTION,
    "rpc_aggregate_part": _REDUCTION,
    "rpc_join_group": _GROUPS,
    "rpc_download_state": "override get_current_state(), which says what others download",
    "_step": "override step()",
    "start": "override run_in_background()",
    "run": _BACKGROUND,
    "_run_internal": _BACKGROUND,
    "_shutdown": "override shutdown()",
    "_get_group_bits": _GROUPS,
    "_set_group_bits": _GROUPS,
    "_load_state_from_peers": "override load_state_from_peers()",
    "_get_current_state_from_host_process": "override get_current_state()",
    "_declare_for_download_periodically": _DECLARING,
    "_trigger_declare_load_state": _DECLARING,
    "add_p2p_handlers": _CALLS,
    "remove_p2p_handlers": _CALLS,
    "get_stub": _CALLS,
    "_collect_rpc_handlers": _CALLS,
    "_get_handle_name": _CALLS,
    "_make_rpc_caller": _CALLS,
}
"""Names of hivemind's averager that a subclass may define there to change it, and what takes their place."""


def check_overrides(subclass: type, base: type) -> None:
    """Called when ``subclass`` of ``base`` is created.

    :raises InvalidTypeError: (a TypeError) it, or a class that it inherits from besides ``base``, defines a method that
      would never be called; the message names method, class and what to use instead
    """
    for owner, name in _names_besides(subclass, base):
        if name.startswith(_RPC) or name in INSTEAD:
            whose = "" if owner is subclass else f" (inherited by {subclass.__qualname__})"
            raise InvalidTypeError(
                f"{owner.__qualname__}.{name}{whose} would have no effect: hivemind calls it, Shoal does not. "
                f"Instead: {INSTEAD.get(name, _CALLS)}"
            )


def _names_besides(subclass: type, base: type) -> Iterator[tuple[type, str]]:
    """What ``subclass`` adds to ``base``: (class, name). Classes that it lists behind ``base`` override nothing there,
    but hivemind would serve the calls that they define.
    """
    behind = False
    for owner in subclass.__mro__:
        if owner in base.__mro__:
            behind = True
            continue
        for name in vars(owner):
            if not behind or name.startswith(_RPC):
                yield owner, name
