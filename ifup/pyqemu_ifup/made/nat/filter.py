"""The packet filter of a network with `nat:`, as ops: its table is loaded, and deleted."""

from __future__ import annotations

from dataclasses import dataclass

from pyqemu_ifconf.shell import Command, nft_command
from pyqemu_ifup.drivers import nft_program as nft
from pyqemu_ifup.drivers.nft_table import Table, commands_of, replacing_command, table_name, text_of
from pyqemu_ifup.host import Host
from pyqemu_ifup.made.bridge import MadeOp


@dataclass(frozen=True)
class LoadTable(MadeOp):
    """Load the network's table in one transaction; `anew`: there is one already."""

    table: Table
    anew: bool

    def commands(self) -> tuple[Command, ...]:
        """Return what nft(8) is told: in one line if guests may be behind the table already."""
        if self.anew:
            return (replacing_command(self.network, self.table),)
        return commands_of(self.network, self.table)

    async def run(self, host: Host) -> None:
        """Load it. Raises Failure: 77 without privilege, 71."""
        await nft.load(text_of(self.network, self.table), host.deadline)


@dataclass(frozen=True)
class DeleteTable(MadeOp):
    """Delete the network's table if it carries our mark."""

    def commands(self) -> tuple[Command, ...]:
        """Return what nft(8) is told."""
        return (nft_command("delete table inet {table}", table=table_name(self.network)),)

    async def run(self, host: Host) -> None:
        """Delete it; gone already is success, and so is a host without nft(8)."""
        if not nft.is_there():
            return
        table = await nft.read_table(self.network, host.deadline)
        if table is not None and table.ours:
            await nft.delete_table(self.network, host.deadline)
