"""Whom the directory of users cannot tell is told of, and nobody waits for what never comes."""

from __future__ import annotations

import time

import pytest

from pyqemu_ifconf.failure import Failure
from pyqemu_ifd import users
from pyqemu_ifup.access import User
from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.task import finish


@pytest.mark.parametrize(
    ("error", "told"), [(OSError(5, "no answer"), Failure), (ValueError("odd"), ValueError)]
)
def test_an_error_of_the_directory_is_told_at_once(
    error: Exception, told: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(uid: int) -> User:
        raise error

    monkeypatch.setattr(users, "find_user", find)
    with pytest.raises(told) as caught:
        finish(users.Users().find(1, Deadline(20)), time.sleep)
    assert "deadline" not in str(caught.value)
