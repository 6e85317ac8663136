"""What others say is of the type that it must have, or is a Failure: QMP, netlink."""

from __future__ import annotations

import errno
import gc
import logging
import random
import socket
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.netns import Namespace
from lab.qmp_peer import Peer, line, messages, places, put
from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifctl.qemu import cards
from pyqemu_ifctl.qemu.qmp import GuestNic, _Nonsense, ask_nics, nic_of, read_network
from pyqemu_ifctl.qemu.running import Guest
from pyqemu_ifctl.taps import Row
from pyqemu_ifctl.verbs import info
from pyqemu_ifup.drivers.conntrack import parse_flow
from pyqemu_ifup.drivers.links import IFINFOMSG, RTM_GETLINK, LinkEvents, _counters, _events, _link
from pyqemu_ifup.drivers.netlink import MESSAGE_MAX, NLM_F_DUMP, NLM_F_REQUEST, NLMSGHDR, read_error
from pyqemu_ifup.drivers.netlink import messages as netlink_messages
from pyqemu_ifup.drivers.rtnetlink import Netlink

SECONDS = 20.0
"""That an answer may take on a loaded host; none of these waits."""
ODD: tuple[object, ...] = (
    None,
    True,
    -1,
    2**70,
    1.5,
    float("nan"),
    "x",
    "\ud800",
    "x" * 300,
    "a\0\nb",
    [],
    [[1]],
    {},
    [{"name": 1}],
    {"class": 1, "desc": 2},
)
RAW = (
    b"\n",
    b"{\n",
    b"null\n",
    b"[]\n",
    b"\xff\xfe\n",
    b"[" * 100_000 + b"\n",
    b'{"return": ' + b"9" * 5000 + b"}\n",
    b'{"event": {}}\n',
    b'{"id": []}\n',
    b'{"error": {"class": 1}, "id": "I"}\n',
    b'{"error": {"class": "x", "desc": "y"}}\n',
)
FINE = {Status.UNAVAILABLE, Status.REFUSED}
_numbers = count()


@pytest.fixture
def ask(
    tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> Iterator[Callable[[str, Callable[[dict[str, Any]], bytes]], list[GuestNic] | Failure]]:
    """Asks a QEMU that says something else for its first message of a name.

    Nothing is printed, as Python prints what a library logs.
    """
    folder = tmp_path_factory.mktemp("q")

    def ask(name: str, odd: Callable[[dict[str, Any]], bytes]) -> list[GuestNic] | Failure:
        said: list[str] = []

        def send(which: str, message: dict[str, Any]) -> bytes:
            if which != name or said:
                return line(message)
            said.append(which)
            return odd(message)

        path = folder / str(next(_numbers))
        with Peer(path, send):
            try:
                return ask_nics(str(path), SECONDS)[0]
            except Failure as failure:
                return failure

    with caplog.at_level(logging.WARNING):
        yield ask
        gc.collect()
    assert [record.name for record in caplog.records] == []


Ask = Callable[[str, Callable[[dict[str, Any]], bytes]], list[GuestNic] | Failure]


@pytest.mark.parametrize("name", messages())
def test_a_value_of_another_type(ask: Ask, name: str) -> None:
    for path in places(messages()[name], 3):
        for value in ODD:
            # NOTE: an id that is another request's is waited for, as QEMU may answer late.
            if path == ("id",) and isinstance(value, str | None) and name != "capabilities":
                continue
            told = ask(name, lambda message: line(put(message, path, value)))  # noqa: B023
            assert not isinstance(told, Failure) or told.status in FINE, (path, value, told)
            if isinstance(told, list):
                _show(told)


@pytest.mark.parametrize("name", ["greeting", "network", "mac"])
def test_what_is_no_message(ask: Ask, name: str) -> None:
    for raw in RAW:
        told = ask(name, lambda message: raw.replace(b"I", str(message.get("id")).encode()))  # noqa: B023
        assert isinstance(told, Failure) and told.status in FINE, (raw[:40], told)


def test_a_qemu_that_answers_twice_or_hangs_up(ask: Ask) -> None:
    assert not isinstance(ask("network", lambda message: line(message) * 2), Failure)
    assert not isinstance(
        ask("network", lambda message: b'{"event": "X"}\n' + line(message)), Failure
    )


def _show(nics: list[GuestNic]) -> None:
    """Have `info` tell of them, in both forms."""
    guest = Guest(5, "web1", {7: "web0", 8: "\udcff"}, ())
    sides = {"web0": cards.Side(Row("web0", "ok", 3), None)}
    told = cards.Told(tuple(nics), "/q")
    view = cards.view_of(guest, told, sides, Failure(Status.NO_POLICY, "none"))
    views = cards._with_twins([view])
    assert info.as_text(views).isprintable() is False and info.as_object(views).isascii()


WORDS = st.lists(st.sampled_from((
    "hub ", "0", "-1", "99999999999", "\n", " \\ ", ": ", "index=0,type=", "tap", "nic", "hubport",
    "user", ",ifname=", "web0", ",script=", "fd=", "7", ",", "n0", "h0", "\r\n", "\x0b", "\u2028",
    "\ud800", "\0", ":", " ", "x" * 300, "hub 0\n", "\u00b2", "index=\u00b2,type=tap,",
    "hub 0\n \\ h0: h1: index=0,type=hubport,\n", "hub 1\n \\ h1: h0: index=0,type=hubport,\n",
)), max_size=30).map("".join)  # fmt: skip
VALUE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=300),
    st.sampled_from(("n0", "h0", "web0", "7")),
    st.lists(st.integers(), max_size=2),
)


@settings(max_examples=300, deadline=None)
@given(
    WORDS,
    st.fixed_dictionaries(
        dict.fromkeys(("type", "netdev", "mac", "addr", "parent_bus", "mq", "host_mtu"), VALUE)
    ),
)
def test_any_info_network_and_any_properties(text: str, values: dict[str, Any]) -> None:
    network = read_network(text)
    for path in ("/machine/peripheral/nic0", "/machine/unattached/\ud800"):
        try:
            _show([nic_of(path, values, network)])
        except _Nonsense:
            continue
        fitting = {
            **values,
            "type": "e1000",
            "netdev": "h0",
            "mac": "x",
            "addr": -1,
            "mq": None,
            "parent_bus": None,
            "host_mtu": 0,
        }
        _show([nic_of(path, fitting, network)])


def dump(netns: Namespace) -> bytes:
    """Return a packet of the kernel's about the links of a namespace."""
    with netns.enter(), socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as kernel:
        body = IFINFOMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
        size = NLMSGHDR.size + len(body)
        kernel.send(NLMSGHDR.pack(size, RTM_GETLINK, NLM_F_REQUEST | NLM_F_DUMP, 1, 0) + body)
        return kernel.recv(MESSAGE_MAX)


def read_all(data: bytes) -> int:
    """Read what is a message of a packet in each way; return how many were read."""
    found = 0
    for _, _, _, body, end in netlink_messages(data):
        for read in (
            lambda: _link(data, body, end), lambda: _events(False, data, body, end),  # noqa: B023
            lambda: _counters(data, body, end), lambda: read_error(data, body),  # noqa: B023
            lambda: parse_flow(b"\2" + data[body:end]),  # noqa: B023
        ):  # fmt: skip
            try:
                read()
                found += 1
            except OSError as error:
                assert error.errno == errno.EBADMSG
    return found


def test_what_the_kernel_says_of_links_cut_and_changed(netns: Namespace) -> None:
    netns.add_bridge("br0", mac="02:00:00:00:00:01")
    with netns.tap("web0", up=True):
        netns.ip("link", "set", "web0", "master", "br0")
        data = dump(netns)
    netns.ip("link", "del", "br0")
    assert read_all(data) >= 6
    numbers = random.Random(1)
    for _ in range(400):
        odd = bytearray(data[: numbers.randrange(len(data))] if numbers.random() < 0.5 else data)
        for _ in range(numbers.randrange(1, 6)):
            if odd:
                odd[numbers.randrange(len(odd))] = numbers.choice((0, 1, 3, 4, 255))
        try:
            read_all(bytes(odd))
        except OSError as error:
            assert error.errno == errno.EBADMSG


def test_an_event_that_is_cut_is_one_that_is_lost(inside: Namespace) -> None:
    events = LinkEvents()
    try:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            ours.setblocking(False)
            theirs.send(NLMSGHDR.pack(400, 16, 0, 0, 0) + b"cut")
            events._socket, real = ours, events._socket
            assert events.read() is None
            events._socket = real
    finally:
        events.close()


class Strange:
    """A message of pyroute2's, of MPLS or of a bridge's port without its VLAN."""

    def __init__(self, **fields: object) -> None:
        self.fields = fields

    def __getitem__(self, key: str) -> object:
        return self.fields[key]

    def get_attr(self, name: str) -> object:
        """Return what is odd."""
        return self.fields.get(name)

    def get_attrs(self, name: str) -> list[Strange]:
        """Return an entry without what it is about."""
        return [Strange()]


def test_addresses_and_routes_that_are_no_ip_s(
    inside: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    label = Strange(family=28, index=1, prefixlen=20, dst_len=20, RTA_DST=[{"label": 7}], RTA_OIF=1)
    with Netlink() as kernel:
        monkeypatch.setattr(kernel._route, "get_addr", lambda: [label])
        monkeypatch.setattr(kernel._route, "get_routes", lambda: [label])
        monkeypatch.setattr(kernel._route, "vlandb", lambda *_, **__: [Strange(ifindex=3)])
        assert kernel.destinations() == kernel.addresses() == []
        with pytest.raises(Failure) as caught:
            kernel.vids(3)
    assert caught.value.status == Status.REFUSED
