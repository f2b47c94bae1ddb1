"""Numbers of numpy and torch become Python's own where users hand them over.

Inside, they would do harm: numpy's integers overflow, its float32 rounds times, and neither can be sent. Imports
neither library.
"""

from __future__ import annotations

from typing import Any

_OWN = (bool, int, float, str, type(None))


def plain(value: Any) -> Any:
    """A single number, flag or text of numpy or torch (``np.int64(3)``, ``torch.tensor(3.0)``) as Python's own;
    anything else as it is.
    """
    if type(value) in _OWN:
        return value
    if isinstance(value, str):
        return str(value)
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "shape", None) == ():
        return item()
    return value
