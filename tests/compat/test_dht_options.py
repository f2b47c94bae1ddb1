"""Options of hivemind's DHT that Shoal's ignores with a warning, or refuses with advice."""

from __future__ import annotations

import inspect

import pytest

import shoal
from shoal.compat.dht_options import IGNORED, LIBP2P_OPTIONS, REFUSED, TUNING_OPTIONS
from shoal.dht.config import DHTConfig
from shoal.utils.options import options_of


def test_no_option_of_shoal_is_ignored_or_refused():
    own = {*inspect.signature(shoal.DHT).parameters, *options_of(DHTConfig)}
    assert not own & {*IGNORED, *REFUSED}
    assert not set(IGNORED) & set(REFUSED)
    assert not LIBP2P_OPTIONS & TUNING_OPTIONS


@pytest.mark.parametrize("name", sorted(TUNING_OPTIONS))
def test_what_tunes_hivemind_s_implementation_is_a_warning(name: str):
    with pytest.warns(UserWarning, match=f"^DHT option '{name}' is ignored: it tunes hivemind's"):
        shoal.DHT(start=False, **{name: 1})


@pytest.mark.parametrize("name", REFUSED)
def test_what_shoal_cannot_do_is_an_error_that_says_what_to_do(name: str):
    with pytest.raises(shoal.InvalidTypeError) as caught:
        shoal.DHT(start=False, **{name: object()})
    assert str(caught.value) == f"DHT option {name!r} is not supported: {REFUSED[name]}"
