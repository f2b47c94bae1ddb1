"""The protocol of one connection, sans I/O: from bytes to frames, streams and endings, and back. Pure.

From the wire up: :mod:`.preamble` and :mod:`.handshake` (with :mod:`.noise`) make sure who speaks; :mod:`.sealing`,
:mod:`.receive_buffer` and :mod:`.frames` turn bytes into frames; :mod:`.session` is all of that in one object.
:mod:`.wire` is what frames carry, :mod:`.stream_state` one stream, :mod:`.streams` all streams of a connection,
:mod:`.keepalive` the signs of life.
:mod:`.claims` decides between two peers with one identity, :mod:`.violations` names the ways in which it ends.
"""
