"""What helpers' answers mean, and what a helper does for strangers."""

from __future__ import annotations

import pytest

from shoal.p2p.multiaddr import Multiaddr
from shoal.p2p.reach.dialback import Answer, DialBackResponse, judge
from shoal.p2p.reach.vantage import Vantage
from shoal.testing.peers import make_identity

INNER, OUTER = "/ip4/192.168.1.5/tcp/4000", "/ip4/10.7.0.1/tcp/4000"
WORLD = "/ip4/8.8.8.8/tcp/4000"
MACHINE, SUBNET, ROUTED, TRANSLATED = Vantage


def answer(number: int, vantage: Vantage, outcomes: dict[str, str | None], **foreign: str) -> Answer:
    named = {INNER: foreign["inner"]} if "inner" in foreign else {}
    return Answer(make_identity(f"h{number}").peer_id, vantage, DialBackResponse(outcomes, named))


def verdict(*answers: Answer) -> bool | None:
    return judge(list(answers)).reachable


def test_an_address_that_is_not_what_others_see_is_not_reachable_there() -> None:
    result = judge([answer(1, TRANSLATED, {}, inner="others see this peer at 10.7.0.1")])
    assert result.reachable is False
    assert result.failures == {INNER: "others see this peer at 10.7.0.1"}
    assert not result.refuted, "nobody has dialed it: peers of the same network may"


def test_a_helper_that_says_nothing_does_not_count() -> None:
    refused = Answer(make_identity("h1").peer_id, ROUTED, "rate_limited")
    assert verdict(refused) is None
    assert verdict(answer(1, ROUTED, {})) is None
    assert verdict(refused, answer(2, ROUTED, {OUTER: None})) is True


@pytest.mark.parametrize("narrow", [MACHINE, SUBNET, ROUTED])
def test_the_widest_view_decides(narrow: Vantage) -> None:
    near, far = answer(1, narrow, {INNER: None}), answer(2, TRANSLATED, {OUTER: "refused"}, inner="no")
    result = judge([near, far])
    assert (result.reachable, result.is_contested) == (False, True)
    assert result.confirmed == (Multiaddr.parse(INNER),)
    assert result.refuted == {Multiaddr.parse(OUTER)}
    through = judge([answer(1, narrow, {INNER: "refused"}), answer(2, TRANSLATED, {OUTER: None}, inner="no")])
    assert (through.reachable, through.vantage) == (True, TRANSLATED)
    assert through.confirmed == (Multiaddr.parse(OUTER),)


def test_among_equals_the_majority_decides_and_a_tie_is_a_no() -> None:
    yes, no = [answer(n, ROUTED, {OUTER: None}) for n in range(2)], answer(3, ROUTED, {OUTER: "refused"})
    assert verdict(yes[0], no) is False
    assert verdict(*yes, no) is True
    assert judge([yes[0], no]).confirmed == (Multiaddr.parse(OUTER),)


def test_nobody_denies_alone_that_a_public_address_was_reached() -> None:
    """A helper may call any address this host's, and so claim the widest view."""
    honest = [answer(number, ROUTED, {WORLD: None}) for number in range(2)]
    liar = answer(3, TRANSLATED, {}, inner="no")
    assert verdict(honest[0], liar) is False
    assert judge([honest[0], liar]).is_contested
    assert verdict(*honest, liar) is True


def test_of_an_address_that_a_person_gave_a_helper_elsewhere_knows_nothing() -> None:
    given = Multiaddr.parse(INNER)
    denies = answer(1, TRANSLATED, {}, inner="others see this peer at 10.7.0.1")
    assert judge([denies], [given]).reachable is None
    assert judge([denies, answer(2, TRANSLATED, {INNER: "refused"})], [given]).reachable is False
