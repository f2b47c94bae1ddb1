"""Codes of resets: what is on the wire stays, and what only newer peers know is text."""

from __future__ import annotations

import pickle
from itertools import chain

from shoal.averaging.codes import AveragingCode
from shoal.errors import RemoteError
from shoal.p2p.protocol.codes import ResetCode
from shoal.p2p.protocol.wire import MAX_CODE, decode_reset, encode_reset


def test_codes_never_change():
    assert list(ResetCode) == [
        "cancelled",
        "deadline",
        "busy",
        "unknown_method",
        "failed",
        "internal",
        "finished",
        "bad_address",
        "rate_limited",
    ]
    assert list(AveragingCode) == [
        "unknown_prefix",
        "no_such_round",
        "not_a_member",
        "excluded",
        "round_failed",
        "void",
        "not_leading",
        "casting_vote",
        "not_sharing",
        "state_failed",
        "replaced",
        "too_slow",
    ]


def test_a_code_means_one_thing_and_arrives_whole():
    codes = list(chain[str](ResetCode, AveragingCode))
    assert len(set(codes)) == len(codes)
    for code in codes:
        assert len(code) <= MAX_CODE
        assert decode_reset(encode_reset(code, "")).code == code


def test_a_code_of_a_newer_peer_is_kept_as_text():
    reset = decode_reset(encode_reset("moved_away", "to another town"))
    error = RemoteError(reset.code, reset.message)
    assert error.code == "moved_away"
    assert error.code not in [*ResetCode, *AveragingCode]
    assert str(error) == "to another town [moved_away]"
    assert pickle.loads(pickle.dumps(error)).code == "moved_away"


def test_a_known_code_reads_as_text_in_errors():
    error = RemoteError(ResetCode.BUSY, "no place")
    assert str(error) == "no place [busy]"
    assert error.code == "busy"
