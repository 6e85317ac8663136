"""Loads, reads and removes our chains of nftables' family netdev: the filters at one link.

The messages to the kernel are our own, sent as a batch of nfnetlink: all of it is done, or nothing
(linux/netfilter/nfnetlink.h). One process at a time changes the chains of one link.

NOTE: a chain is bound to its link by name. Linux 6.16 and later keep the chain when the link goes,
and bind it to the next one of that name; so whatever is left over goes with every load.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from pyqemu_ifconf.failure import Failure, Forbidden, Status
from pyqemu_ifconf.shell import nft_command, quote
from pyqemu_ifup.drivers.netlink import (
    NETLINK_NETFILTER,
    NFGENMSG,
    NLM_F_ACK,
    NLM_F_APPEND,
    NLM_F_CREATE,
    NLM_F_EXCL,
    NetlinkSocket,
    attribute,
    attributes,
    bodies,
)
from pyqemu_ifup.drivers.nft_rules import (
    NFNL_SUBSYS_NFTABLES,
    TABLE,
    U32,
    Chain,
    Hook,
    Rule,
    chain_name,
    encode_chain,
    encode_rule,
    is_of_link,
    is_ours,
    name_chain,
    name_rules,
    name_table,
    read_chain,
    read_rule,
)
from pyqemu_ifup.drivers.nft_words import differences

NFNL_MSG_BATCH_BEGIN, NFNL_MSG_BATCH_END, NFNL_BATCH_GENID = 16, 17, 1
NFPROTO_UNSPEC, NFPROTO_NETDEV = 0, 5
NETDEV = NFGENMSG.pack(NFPROTO_NETDEV, 0, 0)
"""The head of what is said of our family."""
NFT_MSG_NEWTABLE, NFT_MSG_GETTABLE, NFT_MSG_DELTABLE = 0, 1, 2
NFT_MSG_NEWCHAIN, NFT_MSG_GETCHAIN, NFT_MSG_DELCHAIN = 3, 4, 5
NFT_MSG_NEWRULE, NFT_MSG_GETRULE, NFT_MSG_DELRULE = 6, 7, 8
NFT_MSG_GETGEN, NFTA_GEN_ID = 16, 1
NFTA_TABLE_FLAGS, NFTA_TABLE_USE = 2, 3
NFT_TABLE_F_DORMANT = 1
ERESTART = 85
"""errno.h keeps it from programs; nfnetlink tells it of a batch that came too late."""
ATTEMPTS = 10
"""How often what others change meanwhile is looked at, and done, anew."""
WHAT = "the guest's frames cannot be filtered"


def load(device: str, index: int, chains: Sequence[Chain]) -> None:
    """Have these chains filter at a link, in the stead of all of ours that are there: at once.

    `device` is the link's name, `index` its ifindex. The chains are named by it, and have our mark:
    see `chain_name` and `mark`. Each frame meets the one or the other. Raises Failure: 69 without
    such a link, 71 if the kernel has no such chains, 75 if others change them all the time, 77
    without privilege, or if the table or one of the chains is somebody else's.
    """
    try:
        if chains:
            _check_link(device, index)
        with Netfilter() as kernel:
            _replace(kernel, device, index, chains)
    except OSError as error:
        if chains or not _lacks(error):
            raise _failure(error) from error


def remove(device: str, index: int) -> None:
    """Take away all chains of ours of a link, be it there or gone, and a table that is empty then.

    None there is success, and so is a kernel without any. Raises Failure as `load`.
    """
    load(device, index, ())


def read(device: str, index: int) -> tuple[Chain, ...]:
    """Return our chains of a link: those named by its ifindex, and those bound to its name.

    A kernel without any has none, and a table that is dormant none in force. Raises Failure as
    `load`.
    """
    look = _try_look(device, index)
    return look.chains if look and not look.is_dormant else ()


def read_all(*, in_force: bool = False) -> tuple[Chain, ...]:
    """Return all chains of ours, whatever has become of their links. Raises Failure as `load`.

    `in_force`: of a table that is dormant there are none.
    """
    try:
        with Netfilter() as kernel:
            table = kernel.table() if in_force else None
            if table is not None and _is_dormant(table):
                return ()
            heads = list(_chains(kernel.chains()))
            rules = kernel.rules()
            chains = (replace(each, rules=tuple(rules.get(each.name, ()))) for each in heads)
            return tuple(filter(is_ours, chains))
    except OSError as error:
        if not _lacks(error):
            raise _failure(error) from error
        return ()


def prove(device: str, index: int, wanted: Sequence[Chain]) -> None:
    """Check that these chains are in force at a link, and none of ours beside them.

    Raises Failure: 71 with the first difference, else as `load`.
    """
    if wanted:
        _check_link(device, index)
    look = _try_look(device, index)
    wrong = differences(wanted, look.chains if look else ())
    if look and look.is_dormant:
        wrong = (f"table netdev {TABLE} is dormant", *wrong)
    if wrong:
        raise Failure(Status.REFUSED, "the guest's frames are not filtered as wanted", wrong[0])


# What is there


@dataclass(frozen=True)
class Look:
    """Our table, as one link is concerned; `use` counts what is in it.

    `chains` are ours of the link. `strange` is a chain of somebody else's that has the name of one,
    "" without such. `foreign`: there are chains, and none in all the table is ours.
    """

    use: int
    is_dormant: bool
    chains: tuple[Chain, ...]
    strange: str
    foreign: bool


def _try_look(device: str, index: int) -> Look | None:
    """Do as `_look`; a kernel without such chains has no table. Raises Failure as `load`."""
    try:
        with Netfilter() as kernel:
            return _look(kernel, device, index)
    except OSError as error:
        if not _lacks(error):
            raise _failure(error) from error
        return None


def _look(kernel: Netfilter, device: str, index: int) -> Look | None:
    """Return what there is of our table, None without it. Raises OSError."""
    table = kernel.table()
    if table is None:
        return None
    told = kernel.chains()
    chains = []
    strange = ""
    name = chain_name(index).encode()
    for head in _chains(told, os.fsencode(device) + b"\0", name + b"\0", name + b"-"):
        named = is_of_link(head.name, index)
        if not named and not (head.base and device in head.base.devices):
            continue
        chain = kernel.with_rules(head)
        if is_ours(chain):
            chains.append(chain)
        elif named:
            strange = chain.name
    others = map(is_ours, map(kernel.with_rules, () if chains else _chains(told)))
    first = next(others, None)
    return Look(
        int.from_bytes(table[NFTA_TABLE_USE], "big"),
        _is_dormant(table),
        tuple(chains),
        strange,
        first is False and not any(others),
    )


def _is_dormant(table: dict[int, bytes]) -> bool:
    return bool(int.from_bytes(table[NFTA_TABLE_FLAGS], "big") & NFT_TABLE_F_DORMANT)


def _lacks(error: OSError) -> bool:
    """Tell whether this is how a kernel answers that has no nftables, or none at a link."""
    missing = error.errno in (errno.EPROTONOSUPPORT, errno.EOPNOTSUPP)
    return missing or (error.errno == errno.EINVAL and not isinstance(error, Refused))


def _failure(error: OSError) -> Failure:
    """Return what to tell of what the kernel has answered."""
    if error.errno == errno.EPERM:
        return Forbidden(WHAT, os.strerror(errno.EPERM), net_admin=True)
    if error.errno == errno.EBUSY and not isinstance(error, Refused):
        return Failure(Status.TRY_AGAIN, WHAT, "nftables never stand still", "try again")
    made = error.message if isinstance(error, Refused) else None
    is_chain = made is not None and made.kind == NFT_MSG_NEWCHAIN
    if _lacks(error) or (is_chain and error.errno == errno.ENOENT):
        base = read_chain(made.body)[1].base if made and is_chain else None
        if base and base.hook is Hook.EGRESS:
            why = "this kernel does not filter what goes out of a link"
            need = "Linux 5.16 or later with CONFIG_NETFILTER_EGRESS"
        else:
            why = "this kernel filters nothing at a link"
            need = "a kernel with CONFIG_NF_TABLES_NETDEV"
        return Failure(Status.REFUSED, WHAT, why, f"run {need}, or do without")
    return Failure(Status.REFUSED, WHAT, error.strerror or str(error))


def _check_link(device: str, index: int) -> None:
    """Raise Failure (69) if the link with this ifindex has another name, or is gone."""
    # NOTE: Linux 6.16 and later take a chain for a link that is not there.
    try:
        name = socket.if_indextoname(index)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        name = ""
    if name != device:
        why = f"link {index} is {quote(name)} now" if name else f"link {index} is gone"
        raise Failure(Status.UNAVAILABLE, f"there is no link {quote(device)}", why)


# What is changed


def _replace(kernel: Netfilter, device: str, index: int, chains: Sequence[Chain]) -> None:
    """Do as `load`. Raises OSError too."""
    for attempt in range(ATTEMPTS):
        generation = None if chains else kernel.generation()
        look = _look(kernel, device, index)
        if chains and look:
            _check_owner(look)
            _wake(kernel, look)
        # NOTE: a table goes with all that is in it, so only as long as nobody has changed a thing.
        is_last = bool(look and not chains and look.use == len(look.chains))
        drops_table = is_last and attempt < ATTEMPTS - 1
        batch = list(_batch(look.chains if look else (), chains, drops_table))
        try:
            if batch:
                kernel.send_batch(batch, generation if drops_table else None)
        except Refused as error:
            if not error.is_overtaken:
                raise
        else:
            return
    why = "somebody else changes them all the time"
    raise Failure(Status.TRY_AGAIN, WHAT, why, "see who does: nft monitor")


def _check_owner(look: Look) -> None:
    """Raise Failure (77) if the table, or a chain that should be ours, is somebody else's."""
    if look.foreign:
        raise Failure(
            Status.DENIED,
            WHAT,
            f"table netdev {TABLE} is somebody else's: no chain there has our mark",
            f"see what it is for, then {nft_command('delete table netdev {name}', name=TABLE)}",
        )
    if look.strange:
        name = look.strange
        form = "delete chain netdev {table} {name}"
        raise Failure(
            Status.DENIED,
            WHAT,
            f"chain {quote(name)} of table netdev {TABLE} is somebody else's",
            f"see what it is for, then {nft_command(form, table=TABLE, name=name)}",
        )


def _wake(kernel: Netfilter, look: Look) -> None:
    # NOTE: in a batch of its own, since no chain can be added to a table that changes its flags.
    if look.is_dormant:
        kernel.send_batch([Message(NFT_MSG_NEWTABLE, 0, _table_body())])


def _batch(old: Sequence[Chain], new: Sequence[Chain], drops_table: bool) -> Iterator[Message]:
    if new:
        yield Message(NFT_MSG_NEWTABLE, NLM_F_CREATE, _table_body())
    # NOTE: a chain goes once no rule jumps there.
    for chain in old:
        yield Message(NFT_MSG_DELRULE, 0, name_rules(chain.name))
    for chain in old:
        yield Message(NFT_MSG_DELCHAIN, 0, name_chain(chain.name))
    if drops_table:
        yield Message(NFT_MSG_DELTABLE, 0, name_table())
    for chain in new:
        yield Message(NFT_MSG_NEWCHAIN, NLM_F_CREATE | NLM_F_EXCL, encode_chain(chain))
    for chain in new:
        for rule in chain.rules:
            body = encode_rule(chain.name, rule)
            yield Message(NFT_MSG_NEWRULE, NLM_F_CREATE | NLM_F_APPEND, body)


def _table_body() -> bytes:
    return name_table() + attribute(NFTA_TABLE_FLAGS, U32.pack(0))


# The socket


@dataclass(frozen=True)
class Message:
    """One message of a batch: its type, its flags, and its attributes."""

    kind: int
    flags: int
    body: bytes


class Refused(OSError):
    """The kernel does nothing of a batch, for this message; None stands for the whole."""

    def __init__(self, code: int, message: Message | None) -> None:
        super().__init__(code, os.strerror(code))
        self.message = message

    @property
    def is_overtaken(self) -> bool:
        """Whether somebody else has changed what the batch was made for."""
        if self.message is None:
            return self.errno == ERESTART
        gone = self.message.kind in (NFT_MSG_DELRULE, NFT_MSG_DELCHAIN, NFT_MSG_DELTABLE)
        came = self.message.kind == NFT_MSG_NEWCHAIN
        return (gone and self.errno == errno.ENOENT) or (came and self.errno == errno.EEXIST)


class Netfilter:
    """A socket by which the kernel is asked of our table and told; a context manager.

    All of it raises OSError as the kernel answers.
    """

    def __init__(self) -> None:
        self._socket = NetlinkSocket(NETLINK_NETFILTER)

    def __enter__(self) -> Netfilter:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._socket.close()

    def generation(self) -> int:
        """Return the number of the ruleset, which changes with everything in it."""
        return int.from_bytes(self._ask_one(NFT_MSG_GETGEN, b"")[NFTA_GEN_ID], "big")

    def table(self) -> dict[int, bytes] | None:
        """Return the attributes of our table, None without it."""
        try:
            return self._ask_one(NFT_MSG_GETTABLE, name_table())
        except FileNotFoundError:
            return None

    def chains(self) -> list[bytes]:
        """Return what the kernel tells of all chains of the family, for `_chains`."""
        return self._socket.dump(_of_nft(NFT_MSG_GETCHAIN), NETDEV)

    def rules(self, chain: str | None = None) -> dict[str, list[Rule]]:
        """Return the rules of a chain, or of all in our table, by the name of their chain."""
        found: dict[str, list[Rule]] = {}
        for data in self._socket.dump(_of_nft(NFT_MSG_GETRULE), NETDEV + name_rules(chain)):
            for body in bodies(data):
                name, rule = read_rule(body[NFGENMSG.size :])
                found.setdefault(name, []).append(rule)
        return found

    def with_rules(self, chain: Chain) -> Chain:
        """Return the chain with its rules."""
        return replace(chain, rules=tuple(self.rules(chain.name).get(chain.name, ())))

    def send_batch(self, batch: Sequence[Message], generation: int | None = None) -> None:
        """Have all of it done, or nothing: then raises Refused.

        `generation`: only as long as the ruleset has this number.
        """
        pack = self._socket.pack
        head = NFGENMSG.pack(NFPROTO_UNSPEC, 0, NFNL_SUBSYS_NFTABLES)
        at = attribute(NFNL_BATCH_GENID, U32.pack(generation)) if generation is not None else b""
        parts = [pack(NFNL_MSG_BATCH_BEGIN, 0, head + at)]
        for left, each in enumerate(batch, 1 - len(batch)):
            # NOTE: what fails answers by itself; the last answers for all that went well.
            flags = each.flags | (0 if left else NLM_F_ACK)
            parts.append(pack(_of_nft(each.kind), flags, NETDEV + each.body))
        parts.append(pack(NFNL_MSG_BATCH_END, 0, head))
        answers = self._socket.send_batch(parts)
        for place, code in answers:
            if code:
                is_of_one = 1 <= place <= len(batch)
                raise Refused(code, batch[place - 1] if is_of_one else None)
        if not answers:
            raise Refused(errno.EIO, None)

    def _ask_one(self, kind: int, body: bytes) -> dict[int, bytes]:
        """Return the attributes of the one thing that is asked for."""
        told = self._socket.ask_one(_of_nft(kind), NETDEV + body)
        return attributes(told[NFGENMSG.size :])


def _of_nft(kind: int) -> int:
    """Return the type of a message of nftables' (linux/netfilter/nfnetlink.h)."""
    return NFNL_SUBSYS_NFTABLES << 8 | kind


def _chains(packets: Sequence[bytes], *marks: bytes) -> Iterator[Chain]:
    """Yield our table's chains, without rules; of those alone whose message holds one of `marks`.

    NOTE: a host with 1,000 guests has thousands of them: what is not asked for is not parsed.
    """
    for data in packets:
        if marks and not any(each in data for each in marks):
            continue
        for body in bodies(data):
            if not marks or any(each in body for each in marks):
                table, chain = read_chain(body[NFGENMSG.size :])
                if table == TABLE:
                    yield chain
