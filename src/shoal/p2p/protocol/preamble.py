"""The plain-text line that each side sends before anything else: who speaks here, and in which versions.

``shoal/MAJOR MIN-MAX\\n``: the major version of the protocol and the range of its minor versions that the
sender speaks, in decimal. Every version, past and to come, begins with such a line of at most 32 bytes, so
that two programs of any age can tell each other why they do not understand each other. Both lines go into the
prologue of the Noise handshake: one that is changed on its way makes the handshake fail.

Pure.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from shoal.errors import InvalidValueError, ProtocolViolation
from shoal.p2p.protocol.violations import NotShoalPeer, OtherVersion
from shoal.utils.checks import Count
from shoal.utils.options import check_options

MAX_PREAMBLE_BYTES = 32
_MAGIC = b"shoal/"
_NUMBER = rb"(0|[1-9][0-9]{0,3})"
_LINE = re.compile(_MAGIC + _NUMBER + rb" " + _NUMBER + rb"-" + _NUMBER + rb"\n")
_MAJOR = re.compile(_MAGIC + _NUMBER + rb"[^0-9]")
_SHOWN_BYTES = 48

# How other programs begin that people point at the wrong port.
_OTHER_PROGRAMS = (
    (re.compile(rb"(GET|HEAD|POST|PUT|DELETE|OPTIONS|CONNECT|PATCH|TRACE|PRI) "), "an HTTP request"),
    (re.compile(rb"HTTP/"), "an HTTP response"),
    (re.compile(rb"[\x14-\x17]\x03[\x00-\x04]"), "TLS"),
    (re.compile(rb"SSH-"), "SSH"),
    (re.compile(rb"\x13/multistream"), "libp2p"),
)


Version = Annotated[int, Count(0, 9999)]
"""As many digits as fit into the line."""


@dataclass(frozen=True)
class Versions:
    """The minor versions ``minimum`` to ``maximum`` of the protocol's version ``major``."""

    major: Version
    minimum: Version
    maximum: Version

    def __post_init__(self) -> None:
        check_options(self)
        if self.minimum > self.maximum:
            raise InvalidValueError(
                f"minimum must be at most the maximum, {self.maximum}, got {self.minimum}"
            )

    def to_preamble(self) -> bytes:
        """The line that announces them."""
        return b"%s%d %d-%d\n" % (_MAGIC, self.major, self.minimum, self.maximum)

    def agree(self, remote: Versions) -> int:
        """The highest minor version that both sides speak; :class:`OtherVersion` if there is none."""
        common = min(self.maximum, remote.maximum)
        if self.major != remote.major or common < max(self.minimum, remote.minimum):
            raise OtherVersion(f"the other side speaks version {remote} of the protocol, this side {self}")
        return common

    def __str__(self) -> str:
        first = f"{self.major}.{self.minimum}"
        return first if self.minimum == self.maximum else f"{first} to {self.major}.{self.maximum}"


SUPPORTED_VERSIONS = Versions(major=1, minimum=0, maximum=0)


def parse_preamble(data: bytes, ours: Versions) -> tuple[Versions, int] | None:
    """The versions that the line at the start of ``data`` announces, and its length; None if it is not
    complete.

    :class:`NotShoalPeer` as soon as it cannot become a preamble, :class:`OtherVersion` for one of another
    major version, whatever its form.
    """
    head = data[:MAX_PREAMBLE_BYTES]
    if not head.startswith(_MAGIC[: len(head)]):
        raise NotShoalPeer(f"the other side does not speak Shoal: it sent {_describe(data)}")
    if b"\n" not in head and len(head) < MAX_PREAMBLE_BYTES:
        return None
    line = head[: head.find(b"\n") + 1] or head
    match = _LINE.fullmatch(line)
    if match is None:
        major = _MAJOR.match(line)
        if major is not None and int(major[1]) != ours.major:
            raise OtherVersion(
                f"the other side speaks version {int(major[1])} of the protocol, this side {ours}: {line!r}"
            )
        raise NotShoalPeer(f"the other side's preamble is malformed: {line!r}")
    major_number, minimum, maximum = (int(number) for number in match.groups())
    if minimum > maximum:
        raise ProtocolViolation(f"the other side's preamble is an empty range of versions: {line!r}")
    return Versions(major_number, minimum, maximum), len(line)


def _describe(data: bytes) -> str:
    shown = repr(data[:_SHOWN_BYTES]) + ("..." if len(data) > _SHOWN_BYTES else "")
    for pattern, program in _OTHER_PROGRAMS:
        if pattern.match(data):
            return f"{shown}, which looks like {program}"
    return shown
