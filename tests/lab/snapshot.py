"""What a network namespace and its Open vSwitch hold, and what has changed between two looks."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.netns import Namespace
from lab.ovs import OpenVSwitch
from lab.warm import pid as warm_pid

MARK = "PYQEMU_IFUP_TEST"
"""The environment variable by which a test's processes are known, wherever they went."""
SETTLE = 3.0
"""Seconds that the kernel, ovs-vswitchd and ending processes have to come to rest."""

# What the kernel counts, computes or times, as opposed to what somebody has set.
FLAGS = {"LOWER_UP", "NO-CARRIER", "RUNNING", "DORMANT", "M-DOWN"}
LINK = {"operstate", "qdisc", "gso_max_segs", "gso_max_size", "tso_max_segs", "tso_max_size"}
BRIDGE = {
    "bridge_id",
    "fdb_n_learned",
    "gc_timer",
    "hello_timer",
    "root_id",
    "root_path_cost",
    "root_port",
    "tcn_timer",
    "topology_change",
    "topology_change_detected",
    "topology_change_timer",
}
BRIDGE_PORT = {
    "bridge_id",
    "config_pending",
    "designated_cost",
    "designated_port",
    "forward_delay_timer",
    "hold_timer",
    "message_age_timer",
    "root_id",
    "state",
    "topology_change_ack",
}
# Columns that ovs-vswitchd writes (vswitch.xml: status and statistics).
OVSDB: Mapping[str, set[str]] = {
    "Bridge": {"datapath_version", "rstp_status", "status"},
    "Port": {"bond_active_slave", "rstp_statistics", "rstp_status", "statistics", "status"},
    "Interface": {
        "admin_state",
        "bfd_status",
        "cfm_fault",
        "cfm_fault_status",
        "cfm_flap_count",
        "cfm_health",
        "cfm_mpid",
        "cfm_remote_mpids",
        "cfm_remote_opstate",
        "duplex",
        "ifindex",
        "lacp_current",
        "link_resets",
        "link_speed",
        "link_state",
        "mac_in_use",
        "mtu",
        "ofport",
        "statistics",
        "status",
    },
}


@dataclass(frozen=True)
class Snapshot:
    """All that a test must leave as it was: `link br0`, `vlan tap0`, `row Port tap0` -> value."""

    entries: Mapping[str, Any]

    @staticmethod
    def take(namespace: Namespace, ovs: OpenVSwitch | None = None) -> Snapshot:
        """Look at links, bridge VLANs, permanent FDB, nft rules, processes, and OVSDB.

        An OVSDB whose server is not running or stopped cannot be read: raises RuntimeError.
        """
        entries: dict[str, Any] = {}
        entries.update(_links(namespace))
        entries.update(_vlans(namespace))
        entries.update(_fdb(namespace))
        entries.update(_nft(namespace))
        entries.update(_processes(namespace, ovs))
        entries.update(_folders(namespace))
        if ovs is not None:
            entries.update(_ovsdb(ovs))
        return Snapshot(entries)


def diff(before: Snapshot, after: Snapshot) -> list[str]:
    """Return a line for each thing that came, went or changed; [] where nothing did."""
    lines = []
    for name in sorted(before.entries.keys() | after.entries.keys()):
        if name not in before.entries:
            lines.append(f"{name}: left behind: {str(after.entries[name])[:300]}")
        elif name not in after.entries:
            lines.append(f"{name}: gone: {str(before.entries[name])[:300]}")
        else:
            lines += _changes(name, before.entries[name], after.entries[name])
    return lines


def leftovers(before: Snapshot, namespace: Namespace, ovs: OpenVSwitch | None = None) -> list[str]:
    """Return what differs from `before` now, or still after 3 s where something does."""
    end = time.monotonic() + SETTLE
    while True:
        lines = diff(before, Snapshot.take(namespace, ovs))
        if not lines or time.monotonic() > end:
            return lines
        time.sleep(0.02)


def _changes(name: str, before: Any, after: Any) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted(before.keys() | after.keys()):
            yield from _changes(f"{name}: {key}", before.get(key), after.get(key))
    elif before != after:
        yield f"{name}: {before!r} -> {after!r}"


def _links(namespace: Namespace) -> dict[str, Any]:
    links = namespace.links()
    masters = {link["master"] for link in links.values() if "master" in link}
    empty = {
        name
        for name, link in links.items()
        if link.get("linkinfo", {}).get("info_kind") == "bridge" and name not in masters
    }
    # NOTE: an empty bridge whose MAC nobody set takes that of its ports, and never goes back.
    loose = empty and _unpinned(namespace, empty)
    entries: dict[str, Any] = {}
    with namespace.enter():
        for name, link in links.items():
            kept = {key: value for key, value in link.items() if key not in LINK}
            kept["flags"] = sorted(set(link["flags"]) - FLAGS)
            info = dict(link.get("linkinfo", {}))
            for part, volatile in (("info_data", BRIDGE), ("info_slave_data", BRIDGE_PORT)):
                data = info.get(part, {})
                info[part] = {key: data[key] for key in data if key not in volatile}
            kept["linkinfo"] = info
            if name in loose:
                del kept["address"]
            switch = Path("/proc/sys/net/ipv6/conf", name, "disable_ipv6")
            kept["disable_ipv6"] = _read(switch)
            entries[f"link {name}"] = kept
    return entries


def _read(path: Path) -> str | None:
    """Return the file's words, None where its link, a switch's of userspace say, has gone."""
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return None


def _unpinned(namespace: Namespace, names: set[str]) -> set[str]:
    """Return those of `names` whose MAC nobody has set (NET_ADDR_SET, linux/netdevice.h)."""
    # NOTE: no netlink attribute tells it, and only `ip netns exec` shows the namespace's own /sys.
    # One that goes just now, as a switch's of userspace does, cannot be asked any more.
    script = 'for name; do cat "/sys/class/net/$name/addr_assign_type" 2>/dev/null || echo -; done'
    ordered = sorted(names)
    argv = ["ip", "netns", "exec", namespace.name, "sh", "-c", script, "sh", *ordered]
    kinds = namespace.run(argv).stdout.split()
    return {name for name, kind in zip(ordered, kinds, strict=True) if kind != "3"}


def _vlans(namespace: Namespace) -> dict[str, Any]:
    done = namespace.run(["bridge", "-j", "-d", "vlan", "show"], check=False)
    if done.returncode != 0 and "Operation not supported" in done.stderr:
        return {}
    if done.returncode != 0:
        raise RuntimeError(f"`bridge vlan show` ended {done.returncode}: {done.stderr.strip()}")
    return {f"vlan {port['ifname']}": port["vlans"] for port in json.loads(done.stdout or "[]")}


def _fdb(namespace: Namespace) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    macs = {name: link.get("address") for name, link in namespace.links().items()}
    for entry in json.loads(namespace.run(["bridge", "-j", "fdb", "show"]).stdout or "[]"):
        if entry.get("state") not in ("permanent", "static"):
            continue
        # NOTE: a link's own MAC is in `link`; group addresses on a link itself come with IPv6.
        multicast = int(entry["mac"][:2], 16) & 1
        if entry["mac"] == macs.get(entry["ifname"]) or (multicast and "master" not in entry):
            continue
        name = f"fdb {entry['ifname']} {entry['mac']} vlan {entry.get('vlan', 'none')}"
        entries[name] = entry
    return entries


def _nft(namespace: Namespace) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    listed = json.loads(namespace.run(["nft", "-j", "list", "ruleset"]).stdout)
    for item in listed["nftables"]:
        ((kind, value),) = item.items()
        if kind == "metainfo":
            continue
        words = [str(value[key]) for key in ("family", "table", "chain", "name") if key in value]
        entries[f"nft {kind} {' '.join(words)} handle {value.get('handle')}"] = _uncounted(value)
    return entries


def _uncounted(value: Any) -> Any:
    """Return an nft object without what its counters have counted."""
    if isinstance(value, dict):
        return {
            key: _uncounted(inner)
            for key, inner in value.items()
            if key not in ("bytes", "packets")
        }
    return [_uncounted(inner) for inner in value] if isinstance(value, list) else value


def _processes(namespace: Namespace, ovs: OpenVSwitch | None) -> dict[str, Any]:
    """Find our children, what runs in the namespace, and what carries the test's mark.

    The switch's own daemons go by their names, so that a test may start them anew.
    """
    daemons = {} if ovs is None else ovs.running()
    mark = f"{MARK}={os.environ[MARK]}".encode() if MARK in os.environ else None
    found: dict[str, Any] = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) in (os.getpid(), warm_pid()):
            continue
        pid = int(folder.name)
        try:
            stat = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
            words = (folder / "cmdline").read_bytes().split(b"\0")
            parent = int(stat[1])
            if stat[0] in "ZX":
                # NOTE: a zombie of ours was not waited for; any other is its parent's affair.
                if parent == os.getpid():
                    found[f"process {pid}"] = "zombie"
                continue
            inside = (folder / "ns/net").stat().st_ino == namespace.inode
            marked = mark is not None and mark in (folder / "environ").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        except PermissionError:
            # NOTE: root may not look into a process that holds more than it; none of ours does.
            continue
        name = b" ".join(words).decode(errors="replace").strip()
        if pid in daemons:
            found[f"daemon {daemons[pid]}"] = name
        elif inside or marked or parent == os.getpid():
            found[f"process {pid}"] = name
    return found


def _folders(namespace: Namespace) -> dict[str, Any]:
    """Find the files of networks that were made in the namespace."""
    run = Path("/run/pyqemu-ifup")
    return {f"folder {path}": "" for path in run.glob(f"*@{namespace.inode}")}


def _ovsdb(ovs: OpenVSwitch) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for table, rows in ovs.rows(*OVSDB).items():
        for row in rows:
            kept = {key: value for key, value in row.items() if key not in OVSDB[table]}
            entries[f"row {table} {row['name']}"] = kept
    return entries
