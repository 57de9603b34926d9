"""Leaving in good order: SIGTERM and Ctrl-C save a checkpoint after the step in flight."""

from __future__ import annotations

import signal

import jax
from jax.experimental import multihost_utils

from jaxlm.schema import UserError


class Preempted(UserError):
    """The run was told to stop and did, after saving. `exit_code` is 128 + the signal, as shells expect."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


class PreemptionGuard:
    """Context in which SIGTERM and SIGINT are remembered instead of killing the process; a second SIGINT kills.

    With several processes the signal may reach only some of them: jax's coordination service, which watches for SIGTERM
    itself, makes all agree on the step to stop at.
    """

    def __enter__(self) -> PreemptionGuard:
        self.received: int | None = None
        self._several = jax.process_count() > 1
        signals = (signal.SIGINT,) if self._several else (signal.SIGTERM, signal.SIGINT)
        self._previous = {s: signal.signal(s, self._remember) for s in signals}
        return self

    def __exit__(self, *_) -> None:
        for s, handler in self._previous.items():
            signal.signal(s, handler)

    def _remember(self, number: int, _) -> None:
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def should_stop(self, step: int) -> bool:
        """Whether to save and leave after this step; every process gets the same answer."""
        if self._several and multihost_utils.reached_preemption_sync_point(step):
            self.received = self.received or signal.SIGTERM
            return True
        return self.received is not None
