"""The one deadline of a run, on the monotonic clock: a value, from which narrower ones are made.

Imports nothing but what the interpreter has loaded anyway, and small C modules.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from pyqemu_ifconf.failure import Failure, Status

GRACE = 2.0
"""Seconds beyond the first deadline in which a failed run may take back what it did."""
TAKEN_BACK = "nothing is left of it"
TOO_LATE = "try again, or raise timeout: in the policy"


class Unconfirmed(Failure):
    """Something is done (75), but who is to act on it has not said so while there was patience."""


def _never() -> str | None:
    return None


def _no_timer(deadline: Deadline | None) -> None:
    """Have nothing break off what waits elsewhere."""


class _Run:
    """What all the deadlines of one run have in common.

    `interrupted` tells in words why the run must stop, or None, and `at_last` what may stop it at
    the very end, too; `wakeup` is a descriptor that turns readable when the first answer may have
    changed, for those who wait. `arm` is told the deadline that bounds the run from now on, None
    when nothing does. `stopped` and `late` tell what then has become of the run, and what to do.
    """

    def __init__(
        self,
        interrupted: Callable[[], str | None],
        at_last: Callable[[], str | None],
        wakeup: int | None,
        arm: Callable[[Deadline | None], None],
        stopped: str,
        late: str,
    ) -> None:
        self.interrupted = interrupted
        self.at_last = at_last
        self.wakeup = wakeup
        self.arm = arm
        self.stopped = stopped
        self.late = late
        self.stopped_at: float | None = None
        """When a way back began because of an interruption."""


class Deadline:
    """A moment at which what is done must have ended, or fail; what else may end it comes with it.

    A narrower one is made by `child`, that of a way back by `undo`. Nothing of one is set from
    outside.
    """

    def __init__(
        self,
        seconds: float,
        interrupted: Callable[[], str | None] = _never,
        wakeup: int | None = None,
        arm: Callable[[Deadline | None], None] = _no_timer,
        *,
        at_last: Callable[[], str | None] = _never,
        stopped: str = TAKEN_BACK,
        late: str = TOO_LATE,
    ) -> None:
        """Begin a run that may take so many `seconds` from now; the rest is as for _Run."""
        run = _Run(interrupted, at_last, wakeup, arm, stopped, late)
        self._set(run, seconds, time.monotonic(), interrupted, undoes=False)
        arm(self)

    def _set(
        self,
        run: _Run,
        seconds: float,
        start: float,
        interrupted: Callable[[], str | None],
        *,
        undoes: bool,
    ) -> None:
        self._run = run
        self.seconds = seconds
        self.start = start
        self.interrupted = interrupted
        """Tells in words why what is done must stop, None where it need not."""
        self.undoes = undoes
        """Whether it bounds a way back."""
        self._latest = start + seconds
        """When the way back may begin at the latest, as far as its time goes."""
        self._back: Deadline | None = None

    def _made(
        self,
        seconds: float,
        start: float,
        interrupted: Callable[[], str | None],
        *,
        undoes: bool = False,
    ) -> Deadline:
        """Return another deadline of the same run."""
        made = Deadline.__new__(Deadline)
        made._set(self._run, seconds, start, interrupted, undoes=undoes)
        return made

    @property
    def wakeup(self) -> int | None:
        """A descriptor that turns readable when `interrupted` may tell something else, or None."""
        return self._run.wakeup if not self.undoes else None

    @property
    def stopped(self) -> str:
        """What has become of a run that was stopped, and what to do, in a clause."""
        return self._run.stopped

    def allowing(self, seconds: float) -> Deadline:
        """Return the deadline that lets the run take `seconds` in all, counted from its start."""
        made = self._made(seconds, self.start, self.interrupted, undoes=self.undoes)
        self._run.arm(made)
        return made

    def renewed(self, seconds: float) -> Deadline:
        """Return the deadline that lets the run take `seconds` from now on."""
        made = self._made(seconds, time.monotonic(), self.interrupted, undoes=self.undoes)
        self._run.arm(made)
        return made

    def remaining(self) -> float:
        """Return the seconds left, 0 when there are none."""
        return max(0.0, self.start + self.seconds - time.monotonic())

    def check(self, doing: str = "") -> None:
        """Raise Failure (75) when the run must stop; `doing` tells what it was busy with."""
        self._stop(self.interrupted())
        if self.remaining() == 0.0:
            raise self.expired(doing)

    def _stop(self, reason: str | None) -> None:
        if reason is not None:
            raise Failure(Status.TRY_AGAIN, "stopped", reason, self._run.stopped)

    def expired(self, doing: str = "") -> Failure:
        """Return the Failure (75) of a run that has used up its time."""
        return Failure(
            Status.TRY_AGAIN,
            f"not done after {self.seconds:g} s",
            doing or "the deadline has passed",
            self._run.late,
        )

    def last_check(self) -> None:
        """Check a last time: from here on, what is done stays. Raises Failure (75) as `check`."""
        self._stop(self._run.at_last())
        self.check()
        self.disarm()

    def disarm(self) -> None:
        """Have done with the clock: what is still to come waits for nobody."""
        self._run.arm(None)

    def child(self, seconds: float) -> Deadline:
        """Return a deadline in `seconds`, or when this one is, for a part of what is done."""
        left = min(seconds, self.remaining())
        made = self._made(left, time.monotonic(), self.interrupted, undoes=self.undoes)
        made._latest = min(made._latest, self._latest)
        return made

    def lasting(self) -> Deadline:
        """Return the deadline for what is better finished than left in the middle, as a way back.

        Whatever interrupts this one leaves it 2 s.
        """
        since: list[float] = []

        def interrupted() -> str | None:
            reason = self.interrupted()
            if reason is not None and not since:
                since.append(time.monotonic())
            return reason if since and time.monotonic() > since[0] + GRACE else None

        made = self._made(self.seconds, self.start, interrupted, undoes=self.undoes)
        made._latest = self._latest
        return made

    def undo(self) -> Deadline:
        """Return the deadline, which nothing interrupts, of the way back when the run has failed.

        It ends 2 s after this one, or 2 s after the way back began where somebody has stopped the
        run and waits. However many parts the way back has, and however often they ask, it is the
        same.
        """
        if self.undoes:
            return self
        if self._back is None:
            run, now = self._run, time.monotonic()
            end = self._latest + GRACE
            if run.stopped_at is None and self.interrupted() is not None:
                run.stopped_at = now
            if run.stopped_at is not None:
                end = min(end, run.stopped_at + GRACE)
            self._back = self._made(max(0.0, end - now), now, _never, undoes=True)
            run.arm(self._back)
        return self._back
