"""`make install`, `make uninstall` and pip, for real: into folders of the test's own."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lab.checkout import ROOT

pytestmark = pytest.mark.host("it packs the checkout, and installs from it")

HOOKS = ("pyqemu-ifup", "pyqemu-ifdown")
PROGRAMS = (*HOOKS, "pyqemu-ifctl", "pyqemu-ifd", "pyqemu-bridge-helper")
WRONG = ("one", "two")
"""Arguments that no program takes."""
NO_INDEX = ("No matching distribution found", "Could not find a version", "Connection")

TRAP = 'import os; open({marker!r}, "a").write(__file__ + "\\n")\n'
"""A module that tells that it was run."""


OF_MAKE = ("MAKELEVEL", "MAKEFLAGS", "MFLAGS")
"""What a make that runs the tests tells every make that they run."""
OWN_ENV = {name: value for name, value in os.environ.items() if name not in OF_MAKE}


def run(
    *argv: str | Path, env: dict[str, str] | None = None, cwd: Path = ROOT, umask: int = -1
) -> subprocess.CompletedProcess[str]:
    """Run `argv` to its end with `env` on top of this process's environment."""
    return subprocess.run(
        [str(word) for word in argv],
        env={**OWN_ENV, **(env or {})},
        cwd=cwd,
        umask=umask,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def need_success(done: subprocess.CompletedProcess[str]) -> str:
    """Return stdout of a run that succeeded; skip the test where there is no package index.

    With CI=true that fails it: there, all must be there.
    """
    failed = done.returncode != 0 and os.environ.get("CI") != "true"
    if failed and any(words in done.stderr for words in NO_INDEX):
        pytest.skip("no package index to install from")
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def files_below(folder: Path) -> set[str]:
    """Return every path below `folder`, but folders, relative to it."""
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }


@dataclass(frozen=True)
class Installed:
    """One installation: `destdir` as packed, and `prefix`, the final place, where a copy lies."""

    destdir: Path
    prefix: Path
    stdout: str

    def make(self, target: str, umask: int) -> subprocess.CompletedProcess[str]:
        """Run `make TARGET` for this DESTDIR and PREFIX under `umask`."""
        where = (f"DESTDIR={self.destdir}", f"PREFIX={self.prefix}", f"PYTHON={sys.executable}")
        return run("make", target, *where, umask=umask)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    """An installation made once for the module, under a umask that shuts everybody out."""
    folder = tmp_path_factory.mktemp("install")
    blank = Installed(folder / "dest dir", folder / "final", "")
    stdout = need_success(blank.make("install", 0o077))
    packed = Path(f"{blank.destdir}{blank.prefix}")
    shutil.copytree(packed, blank.prefix, symlinks=True)
    yield Installed(blank.destdir, blank.prefix, stdout)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_runs_from_its_final_place(installed: Installed, program: str) -> None:
    launcher = installed.prefix / "bin" / program
    first = launcher.read_text().splitlines()[0]
    options = "-IS" if program in HOOKS else "-I"
    assert first == f"#!{installed.prefix}/lib/pyqemu-ifup/bin/python3 {options}"
    done = run(launcher, *WRONG)
    assert (done.returncode, done.stdout) == (64, ""), done.stderr
    assert done.stderr.startswith(("usage: ", f"{program}: ")), done.stderr


@pytest.mark.parametrize("program", HOOKS)
def test_a_hook_loads_no_python_before_it_has_asked(installed: Installed, program: str) -> None:
    """It runs the installed bytecode: what stands in the launcher alone is compiled."""
    launcher = installed.prefix / "bin" / program
    done = run(
        installed.prefix / "lib/pyqemu-ifup/bin/python3",
        "-ISv",
        launcher,
        "web0",
        env={"PYQEMU_IFUP_SOCKET": "/dev/null/agent", "PYQEMU_IFUP_POLICY": ""},
    )
    asked, here, _ = done.stderr.partition(f"/pyqemu_{program[7:]}/__init__.py")
    assert here, "without an agent it does the work"
    bare = run(installed.prefix / "lib/pyqemu-ifup/bin/python3", "-ISv", "-c", "")
    loaded, known = (
        set(re.findall(r"^import '?([\w.]+)'? #", text, re.MULTILINE))
        for text in (asked, bare.stderr)
    )
    assert loaded - known == {"_socket", "fcntl", "errno"}
    code = installed.prefix / "lib/pyqemu-ifup/lib"
    (code_of_thin,) = code.glob("python*/site-packages/pyqemu_ifd/__pycache__/thin.*.pyc")
    assert f"{code_of_thin} matches" in asked


def test_a_hook_finds_its_libraries_without_an_agent(installed: Installed, tmp_path: Path) -> None:
    """yaml to read the policy, pyroute2 to look, ovs to see that nobody listens there."""
    policy = tmp_path / "policy.yaml"
    policy.write_text(
        "version: 1\n"
        "networks: {sw: {bridge: br-int, kind: openvswitch, ovsdb: 'tcp:127.0.0.1:1'}}\n"
        "rules: [{tap: '*', network: sw}]\n"
    )
    policy.chmod(0o644)
    done = run(
        installed.prefix / "bin/pyqemu-ifup", "web0", env={"PYQEMU_IFUP_POLICY": str(policy)}
    )
    assert (done.returncode, done.stdout) == (69, ""), done.stderr
    assert "tcp:127.0.0.1:1" in done.stderr
    assert done.stderr.count("\n") == 1


def test_nothing_names_the_place_of_the_build(installed: Installed) -> None:
    needle = str(installed.destdir).encode()
    for name in files_below(installed.prefix):
        path = installed.prefix / name
        if not path.is_symlink():
            assert needle not in path.read_bytes(), name


def test_modes_do_not_depend_on_the_umask(installed: Installed) -> None:
    for path in (installed.destdir, *installed.destdir.rglob("*")):
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            continue
        wanted = 0o755 if stat.S_ISDIR(mode) or mode & 0o100 else 0o644
        assert stat.S_IMODE(mode) == wanted, f"{path}: {stat.S_IMODE(mode):04o}"


def test_no_python_file_lacks_its_bytecode(installed: Installed) -> None:
    """A first run must not compile: root's PREFIX may be read-only."""
    sources = [path for path in (installed.prefix / "lib").rglob("*.py") if "-" not in path.stem]
    assert sources
    for source in sources:
        cached = source.parent / "__pycache__" / f"{source.stem}.{sys.implementation.cache_tag}.pyc"
        assert cached.is_file(), source
        header = cached.read_bytes()[:16]
        assert int.from_bytes(header[4:8], "little") == 0, f"{cached}: not checked by time"
        assert int.from_bytes(header[8:12], "little") == int(source.stat().st_mtime), cached


def test_pip_and_setuptools_are_not_left_for_root_to_load(installed: Installed) -> None:
    names = {path.name for path in (installed.prefix / "lib").rglob("site-packages/*")}
    assert "yaml" in names
    assert not names & {"pip", "setuptools", "pkg_resources", "_distutils_hack"}
    assert not [name for name in names if name.endswith(".pth")]


def test_pages_and_samples_are_installed(installed: Installed) -> None:
    share = installed.prefix / "share"
    pages = [*ROOT.glob("if*/*.8"), *ROOT.glob("conf/*.5")]
    for page in pages:
        copy = share / "man" / f"man{page.suffix[1:]}" / page.name
        assert copy.read_text() == page.read_text().replace("/usr/local/", f"{installed.prefix}/")
    for sample in (*ROOT.glob("conf/*.yaml"), *ROOT.glob("*/*.schema.json")):
        copy = share / "pyqemu-ifup" / sample.name
        assert copy.read_text() == sample.read_text().replace("/usr/local/", f"{installed.prefix}/")
    policy = installed.destdir / "etc/pyqemu-ifup/policy.yaml"
    assert policy.read_text() == (share / "pyqemu-ifup/first.yaml").read_text()


def test_what_is_installed_says_where_it_is(installed: Installed) -> None:
    """Each path below the prefix that a page names is there, and none names another prefix."""
    named = set()
    texts = (
        path for name in ("share", "lib/systemd") for path in (installed.prefix / name).rglob("*")
    )
    for text in filter(Path.is_file, texts):
        said = text.read_text()
        # NOTE: QEMU's own helper may be there, wherever we are.
        assert not re.search(r"/usr/local/(?!libexec/qemu)|PREFIX/", said), text
        named |= {
            (text.name, path.rstrip("."))
            for path in re.findall(rf"{re.escape(str(installed.prefix))}(?:/[\w.@-]+)+", said)
        }
    assert {path.rpartition("/")[2] for _, path in named} >= {*HOOKS, "pyqemu-bridge-helper"}
    for name, path in named:
        assert Path(path).exists() or Path(path.removesuffix("/pyqemu-if")).is_dir(), (name, path)


def test_what_is_printed_finds_what_is_installed(installed: Installed) -> None:
    """Where no shell looks for it: with the path, to be pasted as it is."""
    code = "from pyqemu_ifconf.shell import ifctl, takeover; print(ifctl('version')); "
    code += "print(takeover('--help'))"
    python = installed.prefix / "lib/pyqemu-ifup/bin/python3"
    ifctl, takeover = need_success(run(python, "-I", "-c", code)).splitlines()
    elsewhere = {"PATH": "/usr/bin:/bin"}
    assert run("sh", "-c", ifctl, env=elsewhere).stdout.startswith("pyqemu-ifctl ")
    assert run("sh", "-c", takeover, env=elsewhere).stderr.startswith("usage: pyqemu-takeover ")


def test_completion_is_where_the_shells_look(installed: Installed) -> None:
    share = installed.prefix / "share"
    verbs = "check explain status"
    assert verbs in (share / "bash-completion/completions/pyqemu-ifctl").read_text()
    zsh = (share / "zsh/site-functions/_pyqemu-ifctl").read_text()
    assert zsh.startswith("#compdef pyqemu-ifctl\n")


def test_the_takeover_is_for_what_is_installed(installed: Installed) -> None:
    program = installed.prefix / "sbin/pyqemu-takeover"
    assert f"\nbin='{installed.prefix}/bin'\n" in program.read_text()
    done = run(program, *WRONG)
    usage = "usage: pyqemu-takeover [--helper] [--undo] | --version\n"
    assert (done.returncode, done.stderr) == (64, usage)
    said = need_success(run(program, "--version"))
    version = re.search(r"^version = (.*)$", (ROOT / "setup.cfg").read_text(), re.M)
    assert version is not None and said == f"pyqemu-takeover {version[1]}\n"


def test_the_units_start_what_is_installed(installed: Installed) -> None:
    units = installed.prefix / "lib/systemd/system"
    for source in ROOT.glob("conf/systemd/*"):
        text = source.read_text().replace("@bin@", str(installed.prefix / "bin"))
        assert (units / source.name).read_text() == text
    service = (units / "pyqemu-ifd.service").read_text().splitlines()
    assert f"ExecStart={installed.prefix}/bin/pyqemu-ifd" in service


@dataclass(frozen=True)
class Traps:
    """Folders full of modules that must not run, and the file that tells which did."""

    folder: Path
    marker: Path
    env: dict[str, str]


@pytest.fixture
def traps(tmp_path: Path, installed: Installed) -> Iterator[Traps]:
    """Lay traps on every way by which Python takes code that the caller chose."""
    marker = tmp_path / "ran"
    folder = tmp_path / "hostile"
    home = tmp_path / "home"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    user_site = home / ".local" / "lib" / version / "site-packages"
    beside = installed.prefix / "bin"
    packages = ("pyqemu_ifconf", "pyqemu_ifup", "pyqemu_ifdown", "pyqemu_ifctl", "pyqemu_ifd")
    standard = ("json", "os", "re", "errno", "argparse", "sitecustomize", "usercustomize")
    own = ("_socket", "fcntl", "posix", "syslog", "_frozen_importlib_external")
    laid = []
    for place in (folder, user_site, beside):
        place.mkdir(parents=True, exist_ok=True)
        for module in (*packages, *standard, *own, "yaml", "startup"):
            trap = place / f"{module}.py"
            trap.write_text(TRAP.format(marker=str(marker)))
            laid.append(trap)
    hooked = f"import os; open({str(marker)!r}, 'a').write('pth')\n"
    (user_site / "trap.pth").write_text(hooked)
    yield Traps(
        folder,
        marker,
        {
            "PYTHONPATH": str(folder),
            "PYTHONSTARTUP": str(folder / "startup.py"),
            "PYTHONUSERBASE": str(home / ".local"),
            "PYTHONINSPECT": "1",
            "HOME": str(home),
        },
    )
    for trap in laid:
        trap.unlink()


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(
    "more",
    ["", "PYTHONHOME", "PYTHONPLATLIBDIR"],
    ids=["no more", "PYTHONHOME", "PYTHONPLATLIBDIR"],
)
def test_hostile_python_files_and_variables_are_not_run(
    installed: Installed, traps: Traps, more: str, program: str
) -> None:
    extra = {"PYTHONHOME": str(traps.folder), "PYTHONPLATLIBDIR": "hostile"}
    env = {**traps.env, more: extra[more]} if more else traps.env
    done = run(installed.prefix / "bin" / program, *WRONG, env=env, cwd=traps.folder)
    assert (done.returncode, done.stdout) == (64, ""), done.stderr
    assert not traps.marker.exists(), traps.marker.read_text()


@pytest.mark.parametrize("way", ["variable", "user site", "beside the script"])
def test_the_traps_work(installed: Installed, traps: Traps, way: str) -> None:
    """The same without `-I`, one way at a time: each trap does catch."""
    if way == "user site":
        # NOTE: a venv has no user site, so its base interpreter shows this one.
        interpreter = Path(os.path.realpath(sys.executable))
        run(interpreter, "-c", "", env={**traps.env, "PYTHONPATH": ""}, cwd=Path("/"))
    elif way == "variable":
        run(sys.executable, "-c", "", env=traps.env, cwd=Path("/"))
    else:
        launcher = installed.prefix / "bin" / "pyqemu-ifup"
        run(installed.prefix / "lib/pyqemu-ifup/bin/python3", launcher, cwd=Path("/"))
    assert traps.marker.exists()


def test_an_upgrade_keeps_the_policy_and_uninstall_leaves_nothing_else(
    installed: Installed, tmp_path: Path
) -> None:
    destdir = tmp_path / "packed"
    shutil.copytree(installed.destdir, destdir, symlinks=True)
    again = Installed(destdir, installed.prefix, "")
    packed = Path(f"{destdir}{installed.prefix}")
    before = files_below(packed)
    policy = destdir / "etc/pyqemu-ifup/policy.yaml"
    policy.write_text("version: 1\n# mine\n")
    bystander = packed / "bin" / "bystander"
    bystander.write_text("not ours\n")
    not_made = packed / "share" / "man" / "man1"
    not_made.mkdir()
    gone_since = packed / "share/man/man8/pyqemu-old.8"
    gone_since.parent.mkdir(parents=True, exist_ok=True)
    gone_since.write_text("a page of an earlier version\n")
    with (packed / "lib/pyqemu-ifup/installed").open("a") as manifest:
        manifest.write(f"{installed.prefix}/share/man/man8/pyqemu-old.8\n")

    stdout = need_success(again.make("install", 0o000))
    assert f"{policy} is there already: left as it is" in stdout
    assert policy.read_text() == "version: 1\n# mine\n"
    assert files_below(packed) - {"bin/bystander"} == before
    for path in packed.rglob("*"):
        mode = path.lstat().st_mode
        assert stat.S_ISLNK(mode) or not mode & 0o022, f"{path}: {stat.S_IMODE(mode):04o}"

    for _ in range(2):
        need_success(again.make("uninstall", 0o022))
        assert files_below(packed) == {"bin/bystander"}
        # Of the folders, those that were there or that others use.
        left = {str(path.relative_to(packed)) for path in packed.rglob("*") if path.is_dir()}
        assert left == {"bin", "share", "share/man", "share/man/man1"}
        assert files_below(destdir / "etc") == {"pyqemu-ifup/policy.yaml"}
    assert policy.read_text() == "version: 1\n# mine\n"


def test_a_failing_install_leaves_the_old_one_as_it_was(
    installed: Installed, tmp_path: Path
) -> None:
    """pip cannot find the dependencies: the installation in use goes on working."""
    destdir = tmp_path / "packed"
    shutil.copytree(installed.destdir, destdir, symlinks=True)
    before = files_below(destdir)
    no_index = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}
    where = (f"DESTDIR={destdir}", f"PREFIX={installed.prefix}", f"PYTHON={sys.executable}")
    done = run("make", "install", *where, env=no_index)
    assert done.returncode != 0
    assert files_below(destdir) == before


REFUSALS = [
    ("relative prefix", "PREFIX=usr", "make install: PREFIX=usr: not an absolute path\n"),
    (
        "white space",
        "PREFIX=/opt/my tools",
        "make install: PREFIX=/opt/my tools: the first line of a program cannot hold white space\n",
    ),
    (
        "one byte too many for the first line",
        "PREFIX=/" + "p" * (256 - len("#!//lib/pyqemu-ifup/bin/python3 -IS")),
        "make install: PREFIX=/"
        + "p" * (256 - len("#!//lib/pyqemu-ifup/bin/python3 -IS"))
        + ": too long for the first line of a program; 255 bytes is the most\n",
    ),
    (
        "old Python",
        "PYTHON={folder}/old",
        "make install: {folder}/old is not Python 3.10 or later;"
        " name one: make install PYTHON=python3.11\n",
    ),
    (
        "no ensurepip, as on Debian without python3-venv",
        "PYTHON={folder}/bare",
        "make install: {folder}/bare makes no virtual environments; apt-get install python3-venv\n",
    ),
]


@pytest.mark.parametrize(("name", "setting", "message"), REFUSALS, ids=[r[0] for r in REFUSALS])
def test_install_refuses(name: str, setting: str, message: str, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.write_text("#!/bin/sh\nexit 1\n")
    bare = tmp_path / "bare"
    lacks = 'case "$3" in *ensurepip*) exit 1;; esac'
    bare.write_text(f'#!/bin/sh\n{lacks}\nexec {sys.executable} "$@"\n')
    old.chmod(0o755)
    bare.chmod(0o755)
    destdir = tmp_path / "dest"
    done = run("make", "install", f"DESTDIR={destdir}", setting.format(folder=tmp_path))
    assert done.returncode != 0
    assert done.stderr.splitlines(keepends=True)[0] == message.format(folder=tmp_path)
    assert not destdir.exists()


def test_pip_installs_the_programs_from_a_checkout(tmp_path: Path) -> None:
    """`pip install .` and then `pip install -e .`, in one venv, from a copy of this tree."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, tree)
    for name in ("conf", "ifup", "ifdown", "ifctl", "ifd"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    venv = tmp_path / "venv"
    need_success(run(sys.executable, "-I", "-m", "venv", venv))
    for arguments, origin in (((".",), venv), (("-e", "."), tree)):
        need_success(run(venv / "bin/pip", "install", "--quiet", *arguments, cwd=tree))
        where = "import pyqemu_ifconf as p; print(p.__file__)"
        module = need_success(run(venv / "bin/python3", "-I", "-c", where, cwd=Path("/")))
        assert module.startswith(str(origin)), module
        for program in PROGRAMS:
            done = run(venv / "bin" / program, *WRONG, cwd=Path("/"))
            assert (done.returncode, done.stdout) == (64, ""), done.stderr
            assert done.stderr.startswith(("usage: ", f"{program}: ")), done.stderr


def test_the_sdist_is_the_whole_checkout(tmp_path: Path) -> None:
    """What is in git is in it, but what git alone needs."""
    tracked = need_success(run("git", "ls-files", "-z")).split("\0")[:-1]
    wanted = {name for name in tracked if name != ".gitignore"}
    for name in wanted:
        (tmp_path / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / "checkout" / name, follow_symlinks=False)
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    need_success(run(sys.executable, "-c", code, cwd=tmp_path / "checkout"))
    (packed,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(packed) as archive:
        names = {each.name.partition("/")[2] for each in archive.getmembers() if not each.isdir()}
    assert wanted - names == set()
    made = {"PKG-INFO"} | {name for name in names if ".egg-info/" in name}
    assert names - wanted <= made
