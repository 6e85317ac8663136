"""The ways in which QEMU can be told of a tap, and what is to be known of each.

One table for both tests: that of the command line alone, and that with the real QEMU. HOOK stands
for the script's path. `tap` is the name that the script is called with.
"""

from __future__ import annotations

from dataclasses import dataclass

HOOK = "HOOK"
MAC = "52:54:00:12:ab:01"
OTHER = "52:54:00:12:ab:02"


@dataclass(frozen=True)
class Spelling:
    """A command line that QEMU takes, and what it tells of `tap`; None is unknown.

    `taps`: how many it calls the script for. Where it does not start, it fails after that.
    """

    title: str
    argv: tuple[str, ...]
    netdev: str | None = "n0"
    mac: str | None = None
    vm: str | None = None
    tap: str = "tap0"
    taps: int = 1
    starts: bool = True


NET = f"tap,id=n0,script={HOOK},downscript=no"
JSON = f'{{"type": "tap", "id": "n0", "script": "{HOOK}", "downscript": "no"}}'
NIC = "model=virtio-net-pci"
OLD = f"script={HOOK},downscript=no"
DEVICE = f"virtio-net-pci,netdev=n0,mac={MAC}"

SPELLINGS = (
    Spelling("netdev", ("-netdev", NET)),
    Spelling("type key", ("-netdev", f"type=tap,id=n0,script={HOOK},downscript=no")),
    Spelling("type key last", ("-netdev", f"id=n0,script={HOOK},downscript=no,type=tap")),
    Spelling(
        "two dashes", ("--netdev", NET, "--device", DEVICE, "--name", "web"), mac=MAC, vm="web"
    ),
    Spelling("ifname", ("-netdev", f"{NET},ifname=web0"), tap="web0"),
    Spelling("ifname twice", ("-netdev", f"{NET},ifname=web0,ifname=web1"), tap="web1"),
    Spelling(
        "ifname too long", ("-netdev", f"{NET},ifname=abcdefghijklmnop"), tap="abcdefghijklmno"
    ),
    Spelling("ifname empty", ("-netdev", f"{NET},ifname=")),
    Spelling("ifname numbered by the kernel", ("-netdev", f"{NET},ifname=vm%d"), tap="vm0"),
    Spelling("ifname with a comma", ("-netdev", f"{NET},ifname=a,,b"), tap="a,b"),
    Spelling("id twice, the first counts", ("-netdev", f"{NET},id=n1")),
    Spelling("ifname by -set", ("-netdev", NET, "-set", "netdev.n0.ifname=web0"), tap="web0"),
    Spelling("JSON netdev", ("-netdev", JSON)),
    Spelling("JSON netdev, ifname", ("-netdev", JSON[:-1] + ', "ifname": "web0"}'), tap="web0"),
    Spelling("JSON in single quotes", ("-netdev", JSON.replace('"', "'"))),
    Spelling("JSON escapes", ("-netdev", JSON.replace("n0", "\\u006e0"))),
    Spelling("device", ("-netdev", NET, "-device", DEVICE), mac=MAC),
    Spelling("device before", ("-device", DEVICE, "-netdev", NET), mac=MAC),
    Spelling(
        "driver key",
        ("-device", f"mac={MAC},netdev=n0,driver=virtio-net-pci", "-netdev", NET),
        mac=MAC,
    ),
    Spelling(
        "MAC in capitals with dashes",
        ("-netdev", NET, "-device", "virtio-net-pci,netdev=n0,mac=52-54-00-12-AB-01"),
        mac=MAC,
    ),
    Spelling(
        "MAC twice",
        ("-netdev", NET, "-device", f"virtio-net-pci,netdev=n0,mac={OTHER},mac={MAC}"),
        mac=MAC,
    ),
    Spelling(
        "MAC by -set",
        (
            "-netdev",
            NET,
            "-device",
            "virtio-net-pci,id=d0,netdev=n0",
            "-set",
            f"device.d0.mac={MAC}",
        ),
        mac=MAC,
    ),
    Spelling("device without a MAC", ("-netdev", NET, "-device", "virtio-net-pci,netdev=n0")),
    Spelling(
        "device with a zero MAC",
        ("-netdev", NET, "-device", "virtio-net-pci,netdev=n0,mac=00:00:00:00:00:00"),
    ),
    Spelling(
        "JSON device",
        (
            "-netdev",
            JSON,
            "-device",
            f'{{"driver": "virtio-net-pci", "netdev": "n0", "mac": "{MAC}"}}',
        ),
        mac=MAC,
    ),
    Spelling(
        "the other device's MAC is not ours",
        (
            "-netdev",
            NET,
            "-netdev",
            "user,id=n1",
            "-device",
            f"virtio-net-pci,netdev=n1,mac={OTHER}",
            "-device",
            DEVICE,
        ),
        mac=MAC,
    ),
    Spelling(
        "-net nic on the netdev",
        ("-netdev", NET, "-net", f"nic,netdev=n0,macaddr={MAC},{NIC}"),
        mac=MAC,
    ),
    Spelling("-nic", ("-nic", f"tap,{OLD},{NIC},mac={MAC}"), netdev=None, mac=MAC),
    Spelling("-nic with id", ("-nic", f"tap,id=n0,{OLD},{NIC},mac={MAC}"), mac=MAC),
    Spelling(
        "-nic with type key", ("-nic", f"{NIC},type=tap,{OLD},mac={MAC}"), netdev=None, mac=MAC
    ),
    Spelling("-nic, ifname", ("-nic", f"tap,ifname=web0,{OLD},{NIC}"), netdev=None, tap="web0"),
    Spelling(
        "-nic, MAC of single digits",
        ("-nic", f"tap,{OLD},{NIC},mac=2:4-0:B:0:9"),
        netdev=None,
        mac="02:04:00:0b:00:09",
    ),
    Spelling("-nic, MAC as a number", ("-nic", f"tap,{OLD},{NIC},mac=0x123456"), netdev=None),
    Spelling(
        "-net nic, -net tap",
        ("-net", f"nic,macaddr={MAC},{NIC}", "-net", f"tap,{OLD}"),
        netdev=None,
        mac=MAC,
    ),
    Spelling(
        "-net tap with id, -net nic",
        ("-net", f"tap,id=n0,{OLD}", "-net", f"nic,macaddr={MAC},{NIC}"),
        mac=MAC,
    ),
    Spelling(
        "-net tap, two -net nic",
        (
            "-net",
            f"nic,macaddr={MAC},{NIC}",
            "-net",
            f"nic,macaddr={OTHER},{NIC}",
            "-net",
            f"tap,{OLD}",
        ),
        netdev=None,
    ),
    Spelling(
        "-net tap, another -net nic on a netdev",
        (
            "-net",
            f"nic,macaddr={MAC},{NIC}",
            "-net",
            f"nic,netdev=u0,macaddr={OTHER},{NIC}",
            "-netdev",
            "user,id=u0",
            "-net",
            f"tap,{OLD}",
        ),
        netdev=None,
        mac=MAC,
    ),
    Spelling(
        "-net tap, a hubport with a device on the same hub",
        (
            "-net",
            f"nic,macaddr={MAC},{NIC}",
            "-netdev",
            "hubport,id=h0,hubid=0",
            "-device",
            f"virtio-net-pci,netdev=h0,mac={OTHER}",
            "-net",
            f"tap,{OLD}",
        ),
        netdev=None,
    ),
    Spelling(
        "netdev on a hub",
        (
            "-netdev",
            NET,
            "-netdev",
            "hubport,id=h0,hubid=0,netdev=n0",
            "-net",
            f"nic,macaddr={MAC},{NIC}",
        ),
    ),
    Spelling("queues", ("-netdev", f"{NET},queues=4", "-device", f"{DEVICE},mq=on"), mac=MAC),
    Spelling(
        "beside a tap that calls no script",
        (
            "-netdev",
            "tap,id=n1,script=no,downscript=no",
            "-netdev",
            NET,
            "-netdev",
            "tap,id=n2,script=,downscript=",
        ),
        tap="tap1",
    ),
    Spelling(
        "two that the kernel names: cannot tell",
        ("-netdev", NET, "-netdev", NET.replace("n0", "n1")),
        netdev=None,
        taps=2,
    ),
    Spelling(
        "two, one named: the other's ifname",
        ("-netdev", f"{NET},ifname=web0", "-netdev", NET.replace("n0", "n1")),
        tap="web0",
        taps=2,
    ),
    Spelling(
        "two, one named: the kernel's name",
        ("-netdev", NET, "-netdev", f"{NET.replace('n0', 'n1')},ifname=web0"),
        taps=2,
    ),
    Spelling("name", ("-name", "web 1", "-netdev", NET), vm="web 1"),
    Spelling("guest key", ("-name", "debug-threads=on,guest=web", "-netdev", NET), vm="web"),
    Spelling(
        "name and flags", ("-netdev", NET, "-name", "web,debug-threads=on,process=x"), vm="web"
    ),
    Spelling(
        "several names",
        ("-name", "a", "-name", "process=x", "-netdev", NET, "-name", "guest=b"),
        vm="b",
    ),
    Spelling("name with commas", ("-name", "a,,b,,,process=x", "-netdev", NET), vm="a,b,"),
    Spelling("no guest in the name", ("-name", "process=x", "-netdev", NET)),
    Spelling("a name like an option", ("-name", "-netdev", "-netdev", NET), vm="-netdev"),
    Spelling(
        "a kernel's words like an option",
        (
            "-append",
            "-netdev tap,id=x,ifname=tap0",
            "-kernel",
            "/nonexistent",
            "-netdev",
            f"{NET},ifname=web0",
        ),
        tap="web0",
        starts=False,
    ),
    Spelling(
        "options without an argument",
        ("-S", "-no-user-config", "-no-reboot", "-netdev", NET, "-no-shutdown"),
    ),
)
"""QEMU 7.2 on machine q35 takes them all."""
