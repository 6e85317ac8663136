"""Asks who a user is where the answer may be long in coming: the directory may be a server."""

from __future__ import annotations

import threading
from concurrent.futures import Future

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifup.access import User, find_user
from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.task import SLICE, pause

FIRST = 0.0005
"""Seconds after which an answer is looked for at first: files on this host give it at once."""
THREADS, THREADS_OF_KNOWN = 16, 24
"""Users who are asked for at a time: beyond the first, those whom the directory has known."""
KNOWN_MAX = 4096
"""How many of those we remember."""
PATIENCE = 1.0
"""Seconds that a user may have to wait until others have been asked for."""


class Users:
    """A thread for each user who is asked for, while there are any."""

    def __init__(self) -> None:
        self._asked: dict[int, Future[User]] = {}
        self._known: set[int] = set()

    async def find(self, uid: int, deadline: Deadline) -> User:
        """Do as `find_user`. Raises Failure (75), also by the deadline."""
        answer = self._asked.get(uid)
        if answer is None or answer.done():
            most = THREADS_OF_KNOWN if uid in self._known else THREADS
            patience = deadline.child(PATIENCE)
            self._forget()
            while len(self._asked) >= most:
                patience.check("the directory of users does not say who others are")
                await pause(min(SLICE, patience.remaining()))
                self._forget()
            answer = self._asked[uid] = Future()
            try:
                threading.Thread(target=_answer, args=(uid, answer), daemon=True).start()
            except RuntimeError as error:
                del self._asked[uid]
                raise _failure(uid, error) from error
        seconds = FIRST
        while not answer.done():
            deadline.check(f"the directory of users does not say who user {uid} is")
            await pause(min(seconds, deadline.remaining()))
            seconds = min(2 * seconds, SLICE)
        if self._asked.get(uid) is answer:
            del self._asked[uid]
        try:
            user = answer.result()
        except OSError as error:
            raise _failure(uid, error) from error
        if user.login != str(uid) and len(self._known) < KNOWN_MAX:
            self._known.add(uid)
        return user

    def _forget(self) -> None:
        """Forget the answers that nobody waits for any more."""
        for uid in [uid for uid, answer in self._asked.items() if answer.done()]:
            del self._asked[uid]


def _failure(uid: int, error: Exception) -> Failure:
    return Failure(Status.TRY_AGAIN, f"cannot ask who user {uid} is", str(error), "try again")


def _answer(uid: int, answer: Future[User]) -> None:
    try:
        found = find_user(uid)
    except BaseException as error:  # NOTE: who waits raises it.
        answer.set_exception(error)
    else:
        answer.set_result(found)
