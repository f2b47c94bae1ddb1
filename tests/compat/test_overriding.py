"""Methods that only hivemind would call: a subclass that defines one is an error when the class is made."""

from __future__ import annotations

from typing import Any

import pytest

from shoal.averaging.trainer.averager import DecentralizedAverager
from shoal.compat.overriding import INSTEAD
from shoal.errors import InvalidTypeError

# Of hivemind 1.1.12's DecentralizedAverager and its ServicerBase: what is called by the background process or by peers.
HOOKS_OF_HIVEMIND = """
    _aggregate_with_group _collect_rpc_handlers _declare_for_download_periodically _get_current_state_from_host_process
    _get_group_bits _get_handle_name _load_state_from_peers _make_rpc_caller _register_allreduce_group
    _run_allreduce_inplace_ _run_internal _set_group_bits _shutdown _step _trigger_declare_load_state add_p2p_handlers
    get_stub remove_p2p_handlers rpc_aggregate_part rpc_download_state rpc_join_group run start"""


def method(self: Any, *args: Any, **kwargs: Any) -> None:
    """Would be called by hivemind."""


@pytest.mark.parametrize("name", HOOKS_OF_HIVEMIND.split())
def test_what_hivemind_calls_and_shoal_does_not_is_an_error(name: str):
    with pytest.raises(InvalidTypeError, match=rf"^Mine\.{name} would have no effect.* Instead: \w+"):
        type("Mine", (DecentralizedAverager,), {name: method})


def test_every_entry_is_a_hook():
    assert sorted(INSTEAD) == sorted(HOOKS_OF_HIVEMIND.split())


def test_a_call_of_the_users_own_is_pointed_to_the_host():
    with pytest.raises(TypeError, match=r"Mine\.rpc_say_hello .*node\.host\.serve"):
        type("Mine", (DecentralizedAverager,), {"rpc_say_hello": method})


def test_a_mixin_counts_wherever_it_overrides():
    mixin = type("Mixin", (), {"_step": method})
    with pytest.raises(InvalidTypeError, match=r"Mixin\._step \(inherited by Mine\)"):
        type("Mine", (mixin, DecentralizedAverager), {})
    type("Harmless", (DecentralizedAverager, mixin), {})  # overrides nothing, in hivemind neither
    served = type("Served", (), {"rpc_say_hello": method})
    with pytest.raises(InvalidTypeError, match=r"Served\.rpc_say_hello \(inherited by Mine\)"):
        type("Mine", (DecentralizedAverager, served), {})


def test_a_subclass_of_a_subclass_is_checked_too():
    first = type("First", (DecentralizedAverager,), {"step": DecentralizedAverager.step})
    with pytest.raises(InvalidTypeError, match=r"^Second\._aggregate_with_group"):
        type("Second", (first,), {"_aggregate_with_group": method})
