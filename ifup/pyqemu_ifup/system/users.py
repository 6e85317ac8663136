"""The users of this machine, as its directory has them (getpwuid(3))."""

from __future__ import annotations

from pyqemu_ifconf.names import bounded
from pyqemu_ifup.hook import waiting_for


def login_of(uid: int) -> str | None:
    """Return the login name of a user, or its number where there is none; None: a name too long."""
    import pwd

    try:
        with waiting_for(f"the directory of users does not say who user {uid} is"):
            return bounded(pwd.getpwuid(uid).pw_name)
    except KeyError:
        return str(uid)
