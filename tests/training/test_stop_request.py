"""StopRequest: the first Ctrl-C requests a stop, the second interrupts."""

from __future__ import annotations

import signal

import pytest

from attention_zoo.training import StopRequest, stop_request


def test_first_ctrl_c_requests_a_stop_and_the_second_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    # SIGINT is ignored if a shell runs the tests in the background, so start from Python's default handler.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StopRequest() as stop:
            assert not stop.made
            signal.raise_signal(signal.SIGINT)
            assert stop.made
            signal.raise_signal(signal.SIGINT)  # forwarded by a launcher
            monkeypatch.setattr(stop_request, "REPEAT", 0.0)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, inherited)
