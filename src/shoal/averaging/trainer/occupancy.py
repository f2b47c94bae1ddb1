"""Who has buffers now: the averager that they were handed over to, and the step whose round reads them."""

from __future__ import annotations

import threading

from shoal.errors import DeadlineExceeded, InvalidStateError
from shoal.utils.checks import check_number


class Occupancy:
    """Methods may be called on any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._holder: str | None = None
        self._step: int | None = None

    @property
    def is_read(self) -> bool:
        """Whether a round reads the buffers, or has an average for them."""
        return self._step is not None

    def take(self, holder: str) -> None:
        """An averager takes the buffers until :meth:`give_back`.

        :param holder: what errors call it
        :raises InvalidStateError: another one has them
        """
        with self._changed:
            if self._holder is not None:
                raise InvalidStateError(
                    f"averaged_tensors must be SharedBuffers that no other averager has, and the averager "
                    f"{self._holder!r} has these: shut it down first. If you have done so, its background process has "
                    "not answered since"
                )
            self._holder = holder

    def give_back(self) -> None:
        """The averager has let go of the buffers, and with it its rounds."""
        with self._changed:
            self._holder = self._step = None
            self._changed.notify_all()

    def begin(self, step: int) -> None:
        """The round of a step reads the buffers from now on."""
        with self._changed:
            self._step = step

    def end(self, step: int) -> None:
        """The round of this step has let go of them; of no effect if that of another one reads them."""
        with self._changed:
            if self._step == step:
                self._step = None
                self._changed.notify_all()

    def is_read_by(self, step: int) -> bool:
        return self._step == step

    def wait(self, timeout: float | None) -> None:
        """:raises DeadlineExceeded: a round still reads the buffers"""
        if timeout is not None:
            timeout = check_number("timeout", timeout, minimum=0, maximum=threading.TIMEOUT_MAX)
        with self._changed:
            if not self._changed.wait_for(lambda: self._step is None, timeout):
                raise DeadlineExceeded(
                    f"the round of step {self._step} of averager {self._holder!r} has not let go of the buffers after "
                    f"{timeout:g} s"
                )

    def __str__(self) -> str:
        if self._holder is None:
            return ""
        return f", averaged by {self._holder!r}" + (", in use" if self.is_read else "")
