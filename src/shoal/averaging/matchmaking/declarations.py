"""What a peer that looks for a group declares in the DHT. Its search decides when that is to be renewed."""

from __future__ import annotations

from shoal.averaging.matchmaking.messages import Declaration, decode_declaration, encode_declaration
from shoal.averaging.matchmaking.states import DECLARATION_PERIOD
from shoal.dht.declaration_kind import DeclarationKind

SEARCHES = DeclarationKind[Declaration]("a search", encode_declaration, decode_declaration)

DECLARATION_LIFETIME = 3 * DECLARATION_PERIOD
"""Seconds until a declaration that is not renewed expires: what a peer that died leaves behind."""
