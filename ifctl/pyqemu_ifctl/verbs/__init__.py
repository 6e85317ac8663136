"""The verbs of pyqemu-ifctl, a module each: its options, its run, and its answer in words."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    # NOTE: typing alone takes as long to load as all that is loaded before signals are heeded.
    from collections.abc import Callable
    from types import ModuleType


class Verb:
    """A verb: its name, what loads its module, and its line in the help.

    The module has `add_arguments(parser)`, which gives a parser the verb's own options, and
    `run(args)`, which returns its Answer, or raises Failure. One that is not `listed` is for the
    shells' completion.

    NOTE: no dataclass, which takes as long to load.
    """

    def __init__(
        self, name: str, load: Callable[[], ModuleType], about: str, *, listed: bool = True
    ) -> None:
        self.name = name
        self.load = load
        self.about = about
        self.listed = listed
