"""Stopping a training loop between two steps."""

from __future__ import annotations

import signal
import time
from typing import Self

REPEAT = 0.5  # seconds in which a second SIGINT is taken for the first, forwarded by a launcher such as torchrun


class StopRequest:
    """Context manager that turns the first Ctrl-C into a request; a second Ctrl-C raises KeyboardInterrupt.

    A loop that checks `made` between two steps stops in a consistent state, whereas an exception within a step may
    leave some of the weights updated. Must be entered in the main thread, in which Python handles signals.

    Attributes:
        made: whether Ctrl-C was pressed.
    """

    def __init__(self) -> None:
        self.made = False
        self._since = 0.0

    def __enter__(self) -> Self:
        self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _handle(self, *_: object) -> None:
        now = time.monotonic()
        if not self.made:
            self.made, self._since = True, now
        elif now - self._since > REPEAT:
            signal.signal(signal.SIGINT, self._previous)
            signal.raise_signal(signal.SIGINT)
