"""Which of two claims to one identity holds, and what proves a claim."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal.p2p.protocol.claims import RECOVERING, SAME_TIME, UNSETTLED, Claim, is_genuine, sign_claim
from shoal.testing.peers import make_identity

claims = st.builds(
    Claim,
    st.integers(1, 2**63 - 1),
    st.one_of(st.sampled_from([UNSETTLED, RECOVERING]), st.floats(0, 1e9, allow_nan=False)),
)


@given(claims, claims)
def test_exactly_one_of_two_claims_holds(a, b):
    if a.incarnation != b.incarnation:
        assert a.outranks(b) != b.outranks(a)


def test_the_order_of_claims():
    assert Claim(1, 0.0).outranks(Claim(2, UNSETTLED))  # it has made sure
    assert Claim(1, 10.0).outranks(Claim(2, 10.0 - 2 * SAME_TIME))  # it holds the identity for longer
    assert Claim(2, 10.0).outranks(Claim(1, 10.0 + SAME_TIME / 2))  # as long, as far as can be measured
    assert Claim(2, UNSETTLED).outranks(Claim(1, UNSETTLED))
    assert Claim(1, 0.0).outranks(Claim(2, RECOVERING))  # it has waited for the other one in vain
    assert Claim(1, RECOVERING).outranks(Claim(2, UNSETTLED))  # the other one is back in time


def test_a_signature_is_good_for_one_claim_and_one_challenge():
    identity, other = make_identity("holder"), make_identity("other")
    signed = sign_claim(identity, Claim(7, 3.0), challenge=11)
    assert is_genuine(signed, identity.peer_id, 11)
    assert not is_genuine(signed, identity.peer_id, 12)
    assert not is_genuine(signed, other.peer_id, 11)
    assert not is_genuine(type(signed)(7, 4.0, signed.signature), identity.peer_id, 11)
    assert not is_genuine(type(signed)(8, 3.0, signed.signature), identity.peer_id, 11)
