"""What ``get_tensors()`` returns: the head of a block, which says so to those who take it for the tensors."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType
from typing import Generic, NoReturn, TypeVar

from shoal.errors import InvalidTypeError

T = TypeVar("T")


class TensorsBlock(AbstractContextManager[T], Generic[T]):
    """For a ``with`` statement, whose target are the tensors. Anything else is an :class:`InvalidTypeError`."""

    def __init__(self, hold: AbstractContextManager[T]) -> None:
        self._hold = hold

    def __enter__(self) -> T:
        return self._hold.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._hold.__exit__(kind, error, trace)

    def _refuse(self, *_: object) -> NoReturn:
        raise InvalidTypeError(
            "get_tensors() must be the head of a block, got another use: write `with averager.get_tensors() as "
            "tensors:` and use the tensors inside. Outside of a block an average may be written to them at any time"
        )

    __iter__ = __len__ = __getitem__ = __contains__ = _refuse

    def __bool__(self) -> bool:
        return True
