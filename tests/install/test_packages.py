"""The Debian package and `make install` on a clean system, with that system's own QEMU.

What is there before is compared, file by file, with what is there after removal.
"""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_install import need_success, run
from test_readme import first_steps

from lab import clean
from lab.checkout import ROOT
from lab.clean import Clean
from lab.needs import QEMU, lack, require
from lab.netns import Namespace
from lab.qemu import Qemu
from pyqemu_ifctl.doctor.running import HELPERS

PYTHON = Path("/usr/bin/python3")
"""The distribution's own, which the package depends on."""
EPOCH, EPOCH_DAY = "1700000000", "2023-11-14"
POLICY = """\
version: 1
networks: {lan: {bridge: br0, isolated: true}}
rules:
  - {tap: web*, network: lan}
"""
STOCK = {f"etc/qemu-{hook}": f"pyqemu-{hook}" for hook in ("ifup", "ifdown")}
UNITS = {
    "etc/systemd/system/multi-user.target.wants/pyqemu-ifd.service",
    "etc/systemd/system/multi-user.target.wants/pyqemu-ifd-users.service",
    "etc/systemd/system/multi-user.target.wants/pyqemu-ifup-gc.service",
    "etc/systemd/system/sockets.target.wants/pyqemu-ifd.socket",
    "etc/systemd/system/sockets.target.wants/pyqemu-ifd-users.socket",
    "etc/systemd/system/timers.target.wants/pyqemu-ifup-gc.timer",
}


@dataclass(frozen=True)
class Files:
    """What the clean systems see at /mnt: `wheels`, `checkout`, and `package` in `out`."""

    folder: Path
    package: str


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The package, and all that `make install` needs without a network."""
    require("root", "tun", "ip")
    if reason := clean.setup():
        lack(reason)
    if shutil.which("dpkg-deb") is None:
        lack("no dpkg-deb in PATH")
    if run(PYTHON, "-I", "-c", "import ensurepip, venv").returncode != 0:
        lack(f"{PYTHON} makes no virtual environments")
    folder = tmp_path_factory.mktemp("packages")
    folder.chmod(0o755)
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    wanted = [*setup["options"]["install_requires"].split(), "setuptools>=64", "wheel"]
    need_success(run(PYTHON, "-I", "-m", "venv", folder / "venv"))
    pip = (folder / "venv/bin/python3", "-I", "-m", "pip")
    need_success(
        run(
            *pip,
            "wheel",
            "--quiet",
            "--wheel-dir",
            folder / "wheels",
            "--constraint",
            ROOT / "conf/constraints.txt",
            *wanted,
        )
    )
    names = (
        "Makefile",
        "setup.cfg",
        "setup.py",
        "pyproject.toml",
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
    )
    (folder / "checkout").mkdir()
    for name in names:
        shutil.copy(ROOT / name, folder / "checkout")
    for name in ("conf", "ifup", "ifdown", "ifctl", "ifd", "docs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / "checkout" / name, ignore=ignored)
    made = run(
        "make", "deb", f"OUT={folder}", env=offline(folder), cwd=folder / "checkout", umask=0o077
    )
    assert made.returncode == 0, made.stderr
    (package,) = folder.glob("*.deb")
    lines = made.stdout.splitlines()
    assert lines[-1] == f"make deb: {package}" and "from PyPI" in lines[0], made.stdout
    return Files(folder, package.name)


def offline(folder: Path) -> dict[str, str]:
    """Return the environment in which pip takes what lies in our folder, and nothing else."""
    return {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(folder / "wheels"),
        "PIP_CONFIG_FILE": os.devnull,
        "SOURCE_DATE_EPOCH": EPOCH,
    }


@pytest.fixture
def system(netns: Namespace, tmp_path: Path, files: Files) -> Iterator[Clean]:
    """A clean system with the bridge br0."""
    netns.add_bridge("br0", mac="02:00:00:00:00:01")
    with Clean(netns, tmp_path / "clean", files.folder) as made:
        yield made
    netns.ip("link", "del", "dev", "br0")


def start(system: Clean, options: str, tap: str = "web0") -> Qemu:
    """Start the system's own QEMU with one tap."""
    return Qemu("-netdev", f"tap,id=n0,ifname={tap}{options}", prefix=system.prefix())


def serves(system: Clean, options: str = "") -> None:
    """See a QEMU's tap plugged in by our hooks while it runs, and gone afterwards."""
    with start(system, options) as qemu:
        assert qemu.greeting, qemu.stderr
        link = system.namespace.link("web0")
        assert (link["master"], "UP" in link["flags"]) == ("br0", True)
        assert link["linkinfo"]["info_slave_data"]["isolated"] is True
        assert "pyqemu-ifup/1 network=lan" in link["ifalias"]
        assert qemu.quit() == 0
        # NOTE: since there is no device on it.
        assert qemu.stderr in ("", f"{QEMU}: warning: netdev n0 has no peer\n")
    assert "web0" not in system.namespace.links()


def difference(before: dict[str, str], after: dict[str, str]) -> set[str]:
    """Return the names that are there in one only, or are not the same in both."""
    return {name for name in {*before, *after} if before.get(name) != after.get(name)}


def stock(system: Clean) -> dict[str, str]:
    """Return QEMU's own two scripts."""
    return {name: system.path(f"/{name}").read_text() for name in STOCK}


WANTED = (
    "usr/bin/pyqemu-ifup",
    "usr/lib/systemd/system/pyqemu-ifup-gc.timer",
    "usr/sbin/pyqemu-takeover",
    "usr/share/bash-completion/completions/pyqemu-ifctl",
    "usr/share/doc/pyqemu-ifup/changelog.gz",
    "usr/share/doc/pyqemu-ifup/copyright",
    "usr/share/doc/pyqemu-ifup/SECURITY.md",
    "usr/share/doc/pyqemu-ifup/docs/troubleshooting.md",
    "usr/share/man/man8/pyqemu-takeover.8.gz",
    "usr/share/zsh/vendor-completions/_pyqemu-ifctl",
)


def test_what_is_in_the_package(files: Files) -> None:
    """All of it root's, writable by nobody else, and of the time that was asked for."""
    package = files.folder / files.package
    listed = need_success(run("dpkg-deb", "--contents", package, env={"TZ": "UTC"})).splitlines()
    for line in listed:
        mode, owner, _size, day, _time, _name = line.split(maxsplit=5)
        assert owner == "root/root" and day <= EPOCH_DAY, line
        assert mode[0] == "l" or (mode[5], mode[8]) == ("-", "-"), line
    names = {line.split(maxsplit=5)[5] for line in listed}
    assert names >= {f"./{name}" for name in WANTED}
    assert not [name for name in names if name.startswith("./etc")]
    fields = need_success(run("dpkg-deb", "--field", package)).splitlines()
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    series = need_success(run(PYTHON, "-Ic", "import sys; print('%d.%d' % sys.version_info[:2])"))
    version = f"{setup['metadata']['version']}+python{series.strip()}"
    assert f"Version: {version}" in fields
    assert files.package.startswith(f"pyqemu-ifup_{version}_")
    packed = "\n".join(listed)
    carried = re.findall(r"site-packages/([^/\s]+)-([^-/\s]+)\.dist-info/$", packed, re.MULTILINE)
    of_others = (f"{normal(name)}=={of}" for name, of in carried if name != "pyqemu_ifup")
    assert sorted(of_others) == constraints()


def constraints() -> list[str]:
    """Return the versions that are locked, each as NAME==VERSION."""
    lines = (ROOT / "conf/constraints.txt").read_text().splitlines()
    pins = (line.split("==") for line in lines if not line.startswith("#"))
    return sorted(f"{normal(name)}=={version}" for name, version in pins)


def normal(name: str) -> str:
    """Return a project's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_links_of_the_pages_lead_somewhere(files: Files, tmp_path: Path) -> None:
    """But those into tests/, which is a part of the sources alone."""
    need_success(run("dpkg-deb", "--extract", files.folder / files.package, tmp_path))
    pages = sorted((tmp_path / "usr/share/doc/pyqemu-ifup").rglob("*.md"))
    assert {page.name for page in pages} >= {page.name for page in (ROOT / "docs").iterdir()}
    for page in pages:
        for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
            if link.startswith("https:"):
                continue
            assert link.startswith("tests/") or (page.parent / link).exists(), (page, link)


def test_the_debian_package(system: Clean, files: Files) -> None:
    """Installed, used, taken over and given back, removed and purged."""
    scripts = stock(system)
    done = system.run("dpkg", "--install", f"/mnt/{files.package}")
    assert done.stderr == ""
    there = system.changes()
    assert there.keys() >= UNITS | {"etc/pyqemu-ifup/policy.yaml"}
    first = (ROOT / "conf/first.yaml").read_text().replace("/usr/local/", "/usr/")
    assert system.path("/etc/pyqemu-ifup/policy.yaml").read_text() == first
    doctor = system.run("pyqemu-ifctl", "doctor", "--json")
    # NOTE: the mode of /dev/net/tun is that of the machine that the tests run on.
    found = {each["check"] for each in json.loads(doctor.stdout)["findings"]}
    assert found <= {"tun-closed"}
    assert system.run("dpkg", "--verify", "pyqemu-ifup").stdout == ""
    needs = system.run("dpkg-query", "--show", "--showformat=${Depends}", "pyqemu-ifup").stdout
    assert {word.split()[0] for word in needs.split(", ")} == {"python3"}

    assert system.run("pyqemu-ifctl", "check").stdout.startswith("ok")
    unit = system.path("/usr/lib/systemd/system/pyqemu-ifup-gc.service").read_text()
    assert "\nExecStart=/usr/bin/pyqemu-ifctl gc\n" in unit
    assert system.run("pyqemu-ifctl", "gc").stdout == "nothing to remove\n"
    assert system.run("pyqemu-ifctl", "version").stdout != "pyqemu-ifctl of a checkout\n"
    system.write("/etc/pyqemu-ifup/policy.yaml", POLICY)
    readme = system.path("/usr/share/doc/pyqemu-ifup/README.md").read_text()
    words = first_steps(readme)[1]
    ours = words[-1].removeprefix("tap,id=n0,ifname=web0")
    assert ours == ",script=/usr/bin/pyqemu-ifup,downscript=/usr/bin/pyqemu-ifdown"
    serves(system, ours)
    told = system.run("pyqemu-ifctl", "decode", "256").stdout
    assert told.endswith("; ours are /usr/bin/pyqemu-ifup and /usr/bin/pyqemu-ifdown\n")
    with start(system, ours, "other0") as qemu:
        assert qemu.wait() == 1
        assert "network script /usr/bin/pyqemu-ifup failed with status 19712" in qemu.stderr
    # Nothing was compiled, or written beside the programs.
    assert difference(there, system.changes()) == {"etc/pyqemu-ifup/policy.yaml"}

    assert stock(system) == scripts
    system.run("pyqemu-takeover")
    serves(system)
    system.run("dpkg", "--remove", "pyqemu-ifup")
    assert stock(system) == scripts
    assert system.run("dpkg-divert", "--list", "*qemu*").stdout == ""
    kept = {"etc/pyqemu-ifup", "etc/pyqemu-ifup/policy.yaml"}
    assert system.changes().keys() == kept
    assert system.path("/etc/pyqemu-ifup/policy.yaml").read_text() == POLICY
    with start(system, "") as qemu:
        assert qemu.greeting
        assert "master" not in system.namespace.link("web0")
        assert qemu.quit() == 0
        assert "no bridge for guest interface found" in qemu.stderr
    system.run("dpkg", "--purge", "pyqemu-ifup")
    assert system.changes() == {}
    assert "not installed" in system.run("dpkg", "--status", "pyqemu-ifup", status=1).stderr


def test_an_upgrade_leaves_what_the_administrator_has_decided(system: Clean, files: Files) -> None:
    """The policy, a disabled unit, the takeover; and QEMU's own upgrade leaves the takeover."""
    install = ("dpkg", "--install", f"/mnt/{files.package}")
    system.path("/etc/pyqemu-ifup").mkdir()
    system.write("/etc/pyqemu-ifup/policy.yaml", POLICY)
    system.run(*install)
    assert system.path("/etc/pyqemu-ifup/policy.yaml").read_text() == POLICY
    # One who has the policy elsewhere gets no sample again.
    system.path("/etc/pyqemu-ifup/policy.yaml").unlink()
    # What systemctl disable does.
    system.path("/etc/systemd/system/timers.target.wants/pyqemu-ifup-gc.timer").unlink()
    system.run("pyqemu-takeover")
    there = system.changes()
    system.run(*install)
    assert difference(there, system.changes()) == set()

    # An upgrade of QEMU's package that brings other scripts.
    script = """
    mkdir -p new/etc new/DEBIAN
    echo '#!/bin/sh' | tee new/etc/qemu-ifup >new/etc/qemu-ifdown
    printf '%s\\n' /etc/qemu-ifup /etc/qemu-ifdown >new/DEBIAN/conffiles
    printf '%s\\n' 'Package: qemu-system-common' 'Version: 1:999' 'Architecture: all' \\
        'Maintainer: a test <root@localhost>' 'Description: other scripts' >new/DEBIAN/control
    dpkg-deb --build new new.deb
    dpkg --install --force-depends --force-breaks new.deb
    """
    system.run("sh", "-euc", f"cd /tmp; {script}")
    for name, program in STOCK.items():
        assert os.readlink(system.path(f"/{name}")) == f"/usr/bin/{program}"
        assert system.path(f"/{name}.distrib").read_text() == "#!/bin/sh\n"
    system.run("dpkg", "--remove", "pyqemu-ifup")
    assert set(stock(system).values()) == {"#!/bin/sh\n"}
    assert not system.path("/etc/qemu-ifup.distrib").exists()


def test_make_install(system: Clean, files: Files) -> None:
    """Installed with what Debian has for it, used, taken over, and uninstalled.

    And made once more, elsewhere, it is byte for byte what the package holds.
    """
    system.run("sh", "-euc", "dpkg --install /opt/packages/*.deb")
    before, scripts = system.changes(), stock(system)

    def make(target: str, *settings: str) -> None:
        words = ("make", "-C", "/mnt/checkout", target, *settings)
        system.run(*words, env=offline(Path("/mnt")))

    make("install")
    system.write("/etc/pyqemu-ifup/policy.yaml", POLICY)
    serves(system, ",script=/usr/local/bin/pyqemu-ifup,downscript=/usr/local/bin/pyqemu-ifdown")
    system.run("pyqemu-takeover")
    assert stock_is(system, "/usr/local/bin/{}")
    serves(system)
    make("uninstall")
    assert stock(system) == scripts
    kept = {"etc/pyqemu-ifup", "etc/pyqemu-ifup/policy.yaml"}
    assert difference(before, system.changes()) == kept

    zsh = "ZSHDIR=/usr/share/zsh/vendor-completions"
    make("install", "PREFIX=/usr", "DESTDIR=/tmp/again", zsh)
    system.run("dpkg-deb", "--extract", f"/mnt/{files.package}", "/tmp/packed")
    # NOTE: the package compresses doc and man, and needs no list of its files; pyvenv.cfg names
    # the patch level of Python.
    but = (f"--exclude={name}" for name in ("doc", "man", "installed", "pyvenv.cfg"))
    system.run("diff", "--recursive", "--no-dereference", *but, "/tmp/again/usr", "/tmp/packed/usr")


def stock_is(system: Clean, target: str) -> bool:
    """Tell whether both of QEMU's scripts lead to ours, `target` with the program's name."""
    return all(
        os.readlink(system.path(f"/{name}")) == target.format(program)
        for name, program in STOCK.items()
    )


def without_dpkg(system: Clean) -> None:
    system.path("/usr/bin/dpkg-divert").rename(system.path("/usr/bin/dpkg-divert.away"))


def with_dpkg(system: Clean) -> None:
    assert system.path("/usr/bin/dpkg-divert").exists()


@pytest.fixture
def bare(system: Clean) -> Clean:
    """The system with programs, of no use but to be there, and the takeover for them."""
    (system.path("/opt/bin")).mkdir()
    for program in STOCK.values():
        system.write(f"/opt/bin/{program}", "#!/bin/sh\n")
        system.path(f"/opt/bin/{program}").chmod(0o755)
    text = (ROOT / "conf/takeover.in").read_text().replace("@bin@", "/opt/bin")
    system.write("/opt/takeover", text)
    return system


@pytest.mark.parametrize("prepare", [with_dpkg, without_dpkg])
def test_the_takeover(bare: Clean, prepare: Callable[[Clean], None]) -> None:
    prepare(bare)
    before, scripts = bare.changes(), stock(bare)

    def takeover(*words: str, status: int = 0) -> str:
        done = bare.run("sh", "/opt/takeover", *words, status=status)
        return done.stdout + done.stderr

    usage = "usage: pyqemu-takeover [--helper] [--undo] | --version\n"
    assert takeover("--help", status=64) == usage
    nobody = ("setpriv", "--reuid=65534", "--clear-groups", "sh", "/opt/takeover", "--undo")
    assert takeover("--undo") == bare.run(*nobody).stderr == ""
    now = "pyqemu-takeover: /etc/qemu-{0} is /opt/bin/pyqemu-{0} now\n"
    assert takeover() == now.format("ifup") + now.format("ifdown")
    assert stock_is(bare, "/opt/bin/{}")
    assert bare.path("/etc/qemu-ifup.distrib").read_text() == scripts["etc/qemu-ifup"]
    once = bare.changes()
    assert "already" in takeover()
    assert difference(once, bare.changes()) == set()
    back = "pyqemu-takeover: /etc/qemu-{} is the one that was there before\n"
    assert takeover("--undo") == back.format("ifup") + back.format("ifdown")
    assert difference(before, bare.changes()) == set()

    # A host without QEMU's scripts.
    for name in STOCK:
        bare.path(f"/{name}").unlink()
    none = bare.changes()
    takeover()
    assert stock_is(bare, "/opt/bin/{}")
    gone = "pyqemu-takeover: /etc/qemu-{} is gone: there was none before\n"
    assert takeover("--undo") == gone.format("ifup") + gone.format("ifdown")
    assert difference(none, bare.changes()) == set()


@pytest.mark.parametrize("prepare", [with_dpkg, without_dpkg])
def test_the_takeover_of_the_helper(bare: Clean, prepare: Callable[[Clean], None]) -> None:
    """Of each that is there; what the two scripts are is another matter, but for --undo alone."""
    prepare(bare)

    def takeover(*words: str, status: int = 0) -> str:
        done = bare.run("sh", "/opt/takeover", *words, status=status)
        return done.stdout + done.stderr

    paths = ("/usr/libexec/qemu-bridge-helper", "/usr/local/libexec/qemu-bridge-helper")
    usual = "/usr/lib/qemu/qemu-bridge-helper"
    bare.write("/opt/bin/pyqemu-bridge-helper", "#!/bin/sh\n")
    bare.path("/opt/bin/pyqemu-bridge-helper").chmod(0o755)
    bare.path(usual).unlink(missing_ok=True)
    assert "pyqemu-takeover: no bridge helper of QEMU's: none of /usr/lib/qemu/" in takeover(
        "--helper", status=69
    )
    for path in paths:
        bare.path(path).parent.mkdir(parents=True, exist_ok=True)
        bare.write(path, f"#!/bin/sh\n# {path}\n")
        bare.path(path).chmod(0o4755)
    before = bare.changes()
    now = "pyqemu-takeover: {} is /opt/bin/pyqemu-bridge-helper now\n"
    assert takeover("--helper") == "".join(map(now.format, paths))
    for path in paths:
        assert os.readlink(bare.path(path)) == "/opt/bin/pyqemu-bridge-helper"
        assert path in bare.path(f"{path}.distrib").read_text()
    once = bare.changes()
    assert "already" in takeover("--helper")
    assert difference(once, bare.changes()) == set()
    back = "pyqemu-takeover: {} is the one that was there before\n"
    takeover()
    assert takeover("--undo", "--helper") == "".join(map(back.format, paths))
    assert stock_is(bare, "/opt/bin/{}")
    takeover("--helper")
    all_of_them = [*(f"/{each}" for each in STOCK), *paths]
    assert takeover("--undo") == "".join(map(back.format, all_of_them))
    assert difference(before, bare.changes()) == set()


def test_doctor_knows_the_helpers_that_the_takeover_does() -> None:
    text = (ROOT / "conf/takeover.in").read_text()
    assert tuple(text.partition("\nhelpers='")[2].partition("'")[0].split()) == HELPERS


def test_what_the_takeover_refuses(bare: Clean) -> None:
    """Nothing is changed then, not even the one that could be."""

    def refused(*words: str, status: int = 77) -> str:
        before = bare.changes()
        done = bare.run("sh", "/opt/takeover", *words, status=status)
        assert difference(before, bare.changes()) == set()
        return done.stderr

    # A diversion of somebody else's, which dpkg-divert does not let go.
    bare.run(
        "dpkg-divert", "--package", "other", "--divert", "/etc/other", "--add", "/etc/qemu-ifup"
    )
    lines = refused(status=71).splitlines()
    assert lines[0].startswith("dpkg-divert: error: ")
    assert lines[-1] == (
        "pyqemu-takeover: /etc/qemu-ifup is not ours now; pyqemu-takeover --undo undoes what was "
        "done"
    )
    bare.run("dpkg-divert", "--package", "other", "--remove", "/etc/qemu-ifup")

    bare.write("/etc/qemu-ifdown.distrib", "mine\n")
    assert refused() == (
        "pyqemu-takeover: /etc/qemu-ifdown has no place to go: /etc/qemu-ifdown.distrib is there "
        "already; move it away\n"
    )
    bare.path("/etc/qemu-ifdown.distrib").unlink()
    bare.path("/etc/qemu-ifdown").unlink()
    bare.path("/etc/qemu-ifdown").symlink_to("/usr/bin/pyqemu-ifdown")
    assert refused() == (
        "pyqemu-takeover: /etc/qemu-ifdown leads to /usr/bin/pyqemu-ifdown, of another "
        "installation; run the pyqemu-takeover --undo of that one\n"
    )
    bare.path("/etc/qemu-ifdown").unlink()
    bare.run("sh", "/opt/takeover")
    bare.path("/etc/qemu-ifup").unlink()
    bare.write("/etc/qemu-ifup", "#!/bin/sh\n")
    done = bare.run("sh", "/opt/takeover", "--undo")
    assert done.stderr == (
        "pyqemu-takeover: /etc/qemu-ifup is somebody else's now: left as it is\n"
    )
    assert bare.path("/etc/qemu-ifup").read_text() == "#!/bin/sh\n"
    bare.path("/opt/bin/pyqemu-ifup").unlink()
    assert refused(status=69) == ("pyqemu-takeover: no /opt/bin/pyqemu-ifup: install it first\n")
    nobody = ("setpriv", "--reuid=65534", "--clear-groups", "sh", "/opt/takeover", "--undo")
    assert bare.run(*nobody, status=77).stderr == (
        "pyqemu-takeover: not permitted to change /etc: run it as root\n"
    )
