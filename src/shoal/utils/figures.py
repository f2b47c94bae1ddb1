"""Figures in words for people: counts, durations, sizes and rates with three digits and a unit that fits. Pure."""

from __future__ import annotations

import math

_UNITS = ("", "k", "M", "G", "T", "P")


def count(number: int, noun: str, plural: str = "") -> str:
    """``1 peer``, ``3 peers``; ``plural`` for nouns that need more than an s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def number(value: float) -> str:
    """A number with three digits, without an exponent where people can do without: 0.024, 1.5, 12,300."""
    if not math.isfinite(value):
        return str(value)
    rounded = float(f"{value:.3g}")
    size = abs(rounded)
    if size >= 1e15 or (0 < size < 1e-4):
        return f"{rounded:.3g}"
    if size >= 100:
        return f"{rounded:,.0f}"
    decimals = 2 - math.floor(math.log10(size)) if size else 0
    text = f"{rounded:.{max(decimals, 0)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def duration(seconds: float) -> str:
    """``72 ms``, ``1.5 s``, ``2 min 5 s``, ``3 h 20 min``, ``5 days 2 h``."""
    size = abs(seconds)
    if not math.isfinite(seconds):
        return str(seconds)
    if size < 0.0009995:
        return f"{number(seconds * 1000)} ms" if size else "0 s"
    if size < 0.9995:
        return f"{number(float(f'{seconds * 1000:.3g}'))} ms"
    if size < 99.95:
        return f"{number(seconds)} s"
    sign, whole = "-" if seconds < 0 else "", round(size)
    if whole < 3600:
        return sign + _two(whole // 60, "min", whole % 60, "s")
    minutes = round(size / 60)
    if minutes < 48 * 60:
        return sign + _two(minutes // 60, "h", minutes % 60, "min")
    hours = round(size / 3600)
    return sign + _two(hours // 24, "days", hours % 24, "h")


def size(nbytes: float) -> str:
    """``72 bytes``, ``7.2 kB``, ``1.5 GB``: powers of 1,000."""
    if nbytes < 1000:
        return count(round(nbytes), "byte")
    return _scaled(nbytes, "B")


def rate(bytes_per_second: float) -> str:
    """As links are measured: ``2.4 kbit/s``, ``15 Mbit/s``."""
    return _scaled(8 * bytes_per_second, "bit/s")


def _scaled(value: float, unit: str) -> str:
    index = 0
    while abs(value) >= 999.5 and index < len(_UNITS) - 1:
        value /= 1000
        index += 1
    return f"{number(value)} {_UNITS[index]}{unit}"


def _two(large: int, unit: str, small: int, small_unit: str) -> str:
    return f"{large:,} {unit} {small} {small_unit}" if small else f"{large:,} {unit}"
