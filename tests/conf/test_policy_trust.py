"""Which files and folders a policy may come from, and what is said of the others."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lab.needs import require
from pyqemu_ifconf import trust
from pyqemu_ifconf.failure import Failure, PolicyInvalid, Status
from pyqemu_ifconf.load import check_policy, load_host_policy, load_policy

pytestmark = pytest.mark.each_python

GOOD = "version: 1\n"
NOBODY = 65534


@pytest.fixture
def root() -> None:
    """Root, which can give files away."""
    require("root")


needs_root = pytest.mark.usefixtures("root")


def write(path: Path, text: str = GOOD, mode: int = 0o644) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    """An /etc/pyqemu-ifup with a good main file and an empty folder of drop-ins."""
    folder = tmp_path / "etc"
    for path in (folder, folder / "policy.d"):
        path.mkdir()
        path.chmod(0o755)
    write(folder / "policy.yaml")
    return folder


def failure_of(load: Callable[[], object]) -> Failure:
    with pytest.raises(Failure) as caught:
        load()
    return caught.value


def test_drop_ins_in_name_order_and_the_main_file_last(etc: Path) -> None:
    for name in ("b.yaml", "a.yaml", "10.yaml", ".c.yaml", "d.yml", "e.yaml.bak", "Z.yaml"):
        write(etc / "policy.d" / name, f"version: 1\nrules: [{{tap: x, deny: {name}}}]\n")
    write(etc / "policy.yaml", "version: 1\nrules: [{tap: x, deny: last}]\n")
    policy = load_host_policy({}, str(etc))
    names = ["10.yaml", "Z.yaml", "a.yaml", "b.yaml"]
    assert list(policy.files) == [
        *(str(etc / "policy.d" / name) for name in names), str(etc / "policy.yaml")
    ]  # fmt: skip
    assert [rule.deny for rule in policy.rules] == [*names, "last"]


def test_drop_ins_alone_are_a_policy(etc: Path) -> None:
    (etc / "policy.yaml").unlink()
    write(etc / "policy.d" / "a.yaml")
    assert load_host_policy({}, str(etc)).files == (str(etc / "policy.d" / "a.yaml"),)


def test_main_file_alone_is_a_policy(etc: Path) -> None:
    (etc / "policy.d").rmdir()
    assert load_host_policy({}, str(etc)).files == (str(etc / "policy.yaml"),)


def test_variable_replaces_all(etc: Path, tmp_path: Path) -> None:
    write(etc / "policy.yaml", "broken: [")
    mine = write(tmp_path / "mine", "version: 1\ntimeout: 3\n")
    policy = load_host_policy({"PYQEMU_IFUP_POLICY": str(mine)}, str(etc))
    assert (policy.files, policy.timeout) == ((str(mine),), 3)
    with pytest.raises(PolicyInvalid):
        load_host_policy({"PYQEMU_IFUP_POLICY": ""}, str(etc))


@pytest.mark.parametrize("there", [True, False])
def test_no_policy_at_all(tmp_path: Path, there: bool) -> None:
    etc = tmp_path / "etc"
    if there:
        (etc / "policy.d").mkdir(parents=True)
        write(etc / "policy.d" / ".hidden.yaml")
    failure = failure_of(lambda: load_host_policy({}, str(etc)))
    assert failure.status == Status.NO_POLICY
    assert str(failure) == (
        f"{etc}/policy.yaml: there is no policy on this host; "
        "write one; the sample policy.yaml shows how"
    )


def make_folder(path: Path) -> None:
    path.mkdir()


def make_fifo(path: Path) -> None:
    os.mkfifo(path, 0o600)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path.name)


LOADS: dict[str, Callable[[Path, Path], object]] = {
    # how: it is given /etc/pyqemu-ifup and the file
    "the host's": lambda etc, path: load_host_policy({}, str(etc)),
    "named": lambda etc, path: load_policy([str(path)]),
    "checked": lambda etc, path: check_policy([str(path)]),
}


@pytest.mark.parametrize("how", LOADS)
@pytest.mark.parametrize("make", [make_folder, make_fifo, make_socket])
@pytest.mark.parametrize("name", ["policy.yaml", "policy.d/a.yaml"])
def test_not_a_file(
    etc: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None], name: str, how: str
) -> None:
    path = etc / name
    path.unlink(missing_ok=True)
    # The name of a socket has a length, the path of a test may have more.
    monkeypatch.chdir(path.parent)
    make(path)
    failure = failure_of(lambda: LOADS[how](etc, path))
    assert failure.status == Status.NO_POLICY
    assert str(failure) == f"{path}: it is not a regular file"


@pytest.mark.parametrize("load", [load_policy, check_policy])
def test_missing_file_that_was_named(tmp_path: Path, load: Callable[[list[str]], object]) -> None:
    failure = failure_of(lambda: load([str(tmp_path / "x" / "y")]))
    assert failure.status == Status.NO_POLICY
    assert str(failure) == f"{tmp_path}/x/y: it does not exist"


def test_folder_that_is_a_file(etc: Path) -> None:
    failure = failure_of(lambda: load_policy([str(etc / "policy.yaml" / "x")]))
    assert failure.status == Status.NO_POLICY
    assert str(failure) == f"{etc}/policy.yaml: it is not a folder"
    (etc / "policy.d").rmdir()
    write(etc / "policy.d")
    failure = failure_of(lambda: load_host_policy({}, str(etc)))
    assert (failure.status, failure.what) == (Status.NO_POLICY, f"{etc}/policy.d")


@needs_root
def test_unreadable_file(etc: Path) -> None:
    path = write(etc / "policy.yaml", mode=0o000)
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            # The folders of a test are root's alone: the file is opened by its name in this one.
            os.chdir(etc)
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            text = str(failure_of(lambda: check_policy(["policy.yaml"])))
            os.write(write_end, text.encode())
        finally:
            os._exit(0)
    os.close(write_end)
    with open(read_end) as told:
        said = told.read()
    os.waitpid(child, 0)
    assert said == f"{path.name}: it cannot be read: Permission denied"


@pytest.mark.parametrize("how", ["the host's", "checked"])
@pytest.mark.parametrize(
    ("mode", "who"), [(0o664, f"group {os.getegid()}"), (0o646, "everybody"), (0o666, "everybody")]
)
def test_file_that_others_can_write(etc: Path, mode: int, who: str, how: str) -> None:
    path = write(etc / "policy.yaml", mode=mode)
    failure = failure_of(lambda: LOADS[how](etc, path))
    assert failure.status == Status.UNSAFE
    assert str(failure) == f"{path}: {who} can write it (mode {mode:04o}); run chmod go-w {path}"


@pytest.mark.parametrize("name", ["", "policy.d"])
@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777])
def test_folder_that_others_can_write(etc: Path, name: str, mode: int) -> None:
    (etc / name).chmod(mode)
    failure = failure_of(lambda: load_host_policy({}, str(etc)))
    assert (failure.status, failure.what) == (Status.UNSAFE, str(etc / name))
    check_policy([str(etc / "policy.yaml")])


def test_folder_far_up_that_others_can_write(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "c" / "policy.yaml"
    path.parent.mkdir(parents=True)
    write(path)
    load_policy([str(path)])
    (tmp_path / "a").chmod(0o777)
    failure = failure_of(lambda: load_policy([str(path)]))
    assert (failure.status, failure.what) == (Status.UNSAFE, str(tmp_path / "a"))


@needs_root
def test_sticky_folder_of_root_passes(etc: Path) -> None:
    etc.chmod(0o1777)
    assert load_host_policy({}, str(etc)).files == (str(etc / "policy.yaml"),)
    os.chown(etc, NOBODY, NOBODY)
    failure = failure_of(lambda: load_host_policy({}, str(etc)))
    assert (failure.status, failure.what) == (Status.UNSAFE, str(etc))


@needs_root
def test_hard_link_in_a_sticky_folder(etc: Path) -> None:
    os.link(etc / "policy.yaml", etc / "old.yaml")
    load_host_policy({}, str(etc))
    etc.chmod(0o1777)
    failure = failure_of(lambda: load_host_policy({}, str(etc)))
    assert failure.status == Status.UNSAFE
    assert str(failure) == (
        f"{etc}/policy.yaml: it has 2 hard links, in a folder that everybody can write; "
        "move it to a folder that only root can write"
    )


@needs_root
@pytest.mark.parametrize("protected", ["1", "0", None])
def test_hard_link_in_a_sticky_folder_of_a_group(
    tmp_path: Path, etc: Path, monkeypatch: pytest.MonkeyPatch, protected: str | None
) -> None:
    """As in /nix/store, where files that are alike are one; the kernel keeps the group from it."""
    sysctl = tmp_path / "protected_hardlinks"
    if protected is not None:
        sysctl.write_text(f"{protected}\n")
    monkeypatch.setattr(trust, "PROTECTED_LINKS", str(sysctl))
    store = tmp_path / "store"
    store.mkdir()
    os.chown(store, 0, 7)
    store.chmod(0o1775)
    (etc / "policy.yaml").rename(store / "hash-policy.yaml")
    os.link(store / "hash-policy.yaml", tmp_path / "alike")
    (etc / "policy.yaml").symlink_to(store / "hash-policy.yaml")
    if protected == "1":
        assert load_host_policy({}, str(etc)).files == (str(etc / "policy.yaml"),)
        return
    failure = failure_of(lambda: load_host_policy({}, str(etc)))
    assert failure.status == Status.UNSAFE
    assert str(failure).startswith(
        f"{store}/hash-policy.yaml: it has 2 hard links, in a folder that group 7 can write; "
    )


@needs_root
@pytest.mark.parametrize("name", ["", "policy.yaml", "policy.d", "policy.d/a.yaml"])
def test_other_owner(etc: Path, name: str) -> None:
    write(etc / "policy.d" / "a.yaml")
    os.chown(etc / name, NOBODY, NOBODY)
    failure = failure_of(lambda: load_host_policy({}, str(etc)))
    assert failure.status == Status.UNSAFE
    assert str(failure) == (
        f"{etc / name}: user {NOBODY} owns it and could change the policy; "
        f"run chown root {etc / name}"
    )


LOAD = """\
import sys
sys.path[:0] = sys.argv[2:]
from pyqemu_ifconf.failure import Failure
from pyqemu_ifconf.load import load_policy
try:
    load_policy([sys.argv[1]])
except Failure as failure:
    print(failure)
"""


ALONE, OTHERS = "0 0 1", "0 0 1\n65534 4711 1"
"""Who is mapped in a user namespace: root, and 65534 as well, as which all show who are not."""


@needs_root
@pytest.mark.parametrize(
    ("given", "mode", "uids", "told"),
    [("above", 0o755, ALONE, ""), ("above", 0o775, ALONE, "group 0 can write it"),
     ("above", 0o757, ALONE, "everybody can write it"), ("above", 0o1777, ALONE, ""),
     ("above", 0o755, OTHERS, "user 65534 owns it"), ("above", 0o1777, OTHERS, "user 65534 owns"),
     ("above/etc", 0o755, ALONE, "whom this user namespace does not have owns it"),
     ("above/etc", 0o1777, ALONE, "whom this user namespace does not have owns it"),
     ("above/etc/policy.yaml", 0o644, ALONE, "whom this user namespace does not have owns it")],
)  # fmt: skip
def test_folder_of_nobody_in_a_user_namespace(
    tmp_path: Path, given: str, mode: int, uids: str, told: str
) -> None:
    """One above the policy's own passes there: a container's `/` that is the host's, say."""
    above = tmp_path / "above"
    for path in (above, above / "etc"):
        path.mkdir()
        path.chmod(0o755)
    policy = write(above / "etc" / "policy.yaml")
    os.chown(tmp_path / given, 7, 0)
    (tmp_path / given).chmod(mode)
    said = failure_of(lambda: load_policy([str(policy)]))
    assert "user 7 owns it and could change the policy" in str(said)
    words = [sys.executable, "-c", LOAD, str(policy), *sys.path]
    process = subprocess.Popen(
        ["unshare", "--user", "sh", "-c", 'echo; read -r _ && exec "$@"', "sh", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    Path(f"/proc/{process.pid}/uid_map").write_text(uids)
    Path(f"/proc/{process.pid}/gid_map").write_text("0 0 1")
    said_inside, _ = process.communicate("\n")
    assert process.returncode == 0
    assert told in said_inside and bool(told) == bool(said_inside), said_inside


@needs_root
def test_check_looks_at_the_owner_of_the_file_alone(etc: Path) -> None:
    path = etc / "policy.yaml"
    os.chown(etc, NOBODY, NOBODY)
    check_policy([str(path)])
    os.chown(path, NOBODY, NOBODY)
    assert failure_of(lambda: check_policy([str(path)])).status == Status.UNSAFE


@needs_root
def test_effective_user_may_own_it(etc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.chown(etc / "policy.yaml", NOBODY, NOBODY)
    monkeypatch.chdir(etc)
    os.seteuid(NOBODY)
    try:
        assert check_policy(["policy.yaml"]).files == ("policy.yaml",)
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("name", ["", "policy.yaml", "policy.d", "policy.d/a.yaml"])
@pytest.mark.parametrize("target", ["{}/real/one", "../real/./two", "../../{name}/real/one"])
def test_symlink(tmp_path: Path, name: str, target: str) -> None:
    """One is followed wherever it stands, and so is one that it leads to."""
    etc = tmp_path / "etc"
    (etc / "policy.d").mkdir(mode=0o755, parents=True)
    write(etc / "policy.yaml")
    write(etc / "policy.d" / "a.yaml")
    (tmp_path / "real").mkdir()
    (etc / name).rename(tmp_path / "real" / "one")
    (tmp_path / "real" / "two").symlink_to("one")
    up = "../" * name.count("/")
    link = Path(os.path.normpath(etc / name))
    text = target.format(tmp_path, name=tmp_path.name)
    link.symlink_to(text if text.startswith("/") else up + text.removeprefix("" if name else "../"))
    files = (str(etc / "policy.d" / "a.yaml"), str(etc / "policy.yaml"))
    assert load_host_policy({}, str(etc)).files == files
    assert load_policy(files).files == check_policy(files).files == files


def given_away(etc: Path, real: Path) -> None:
    os.chown(real / "policy.yaml", NOBODY, NOBODY)


def written_by_all(etc: Path, real: Path) -> None:
    (real / "policy.yaml").chmod(0o666)


def in_a_folder_of_another(etc: Path, real: Path) -> None:
    os.chown(real, NOBODY, NOBODY)


def in_a_folder_of_all(etc: Path, real: Path) -> None:
    real.chmod(0o777)


def below_a_folder_of_all(etc: Path, real: Path) -> None:
    real.parent.chmod(0o777)


def over_a_link_of_another(etc: Path, real: Path) -> None:
    os.chown(etc.parent / "between", NOBODY, NOBODY, follow_symlinks=False)


def over_a_folder_of_all(etc: Path, real: Path) -> None:
    """From which the way leads out again."""
    (etc.parent / "open").mkdir()
    (etc.parent / "open").chmod(0o777)
    (etc / "policy.yaml").unlink()
    (etc / "policy.yaml").symlink_to("../open/../far/real/policy.yaml")


def hard_linked(etc: Path, real: Path) -> None:
    """A link of root's that is old, under a new name in a folder where anybody makes some."""
    etc.chmod(0o1777)
    os.link(etc / "policy.yaml", etc / "old", follow_symlinks=False)


def hard_linked_file(etc: Path, real: Path) -> None:
    real.chmod(0o1777)
    os.link(real / "policy.yaml", real / "old")


def in_a_ring(etc: Path, real: Path) -> None:
    (real / "policy.yaml").unlink()
    (real / "policy.yaml").symlink_to("../../etc/policy.yaml")


def to_nowhere(etc: Path, real: Path) -> None:
    (real / "policy.yaml").unlink()


def to_no_folder(etc: Path, real: Path) -> None:
    (etc.parent / "between").unlink()
    (etc.parent / "between").symlink_to("nowhere/real")


def to_a_folder(etc: Path, real: Path) -> None:
    (etc / "policy.yaml").unlink()
    (etc / "policy.yaml").symlink_to("/")


@needs_root
@pytest.mark.parametrize(
    ("spoil", "status", "where", "why"),
    [
        (given_away, 78, "far/real/policy.yaml", "owns it and could change the policy; run chown"),
        (written_by_all, 78, "far/real/policy.yaml", "everybody can write it"),
        (in_a_folder_of_another, 78, "far/real", f"user {NOBODY} owns it"),
        (in_a_folder_of_all, 78, "far/real", "everybody can write it"),
        (below_a_folder_of_all, 78, "far", "everybody can write it"),
        (over_a_link_of_another, 78, "between", "owns it and could change the policy; "
         "run chown -h root "),
        (over_a_folder_of_all, 78, "open", "everybody can write it"),
        (hard_linked, 78, "etc/policy.yaml", "it has 2 hard links"),
        (hard_linked_file, 78, "far/real/policy.yaml", "it has 2 hard links"),
        (in_a_ring, 66, "etc/policy.yaml", "it leads over more than 40 symbolic links"),
        (to_nowhere, 66, "etc/policy.yaml",
         "it leads to {}/far/real/policy.yaml, which does not exist"),
        (to_no_folder, 66, "etc/policy.yaml", "it leads to {}/nowhere, which does not exist"),
        (to_a_folder, 66, "", "it is not a regular file"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)  # fmt: skip
def test_symlink_that_is_not_trusted_all_the_way(
    etc: Path, spoil: Callable[[Path, Path], None], status: int, where: str, why: str
) -> None:
    """/etc/policy.yaml leads over the link /between to /far/real/policy.yaml."""
    here = etc.parent
    real = here / "far" / "real"
    real.mkdir(parents=True)
    (etc / "policy.yaml").rename(real / "policy.yaml")
    (etc / "policy.yaml").symlink_to("../between/policy.yaml")
    (here / "between").symlink_to(real)
    write(etc / "policy.d" / "a.yaml")
    files = (str(etc / "policy.d" / "a.yaml"), str(etc / "policy.yaml"))
    assert load_host_policy({}, str(etc)).files == files
    spoil(etc, real)
    failure = failure_of(lambda: load_host_policy({}, str(etc)))
    assert (int(failure.status), failure.what) == (status, str(here / where) if where else "/")
    assert why.format(here) in str(failure)
    if spoil is over_a_link_of_another:
        subprocess.run(["sh", "-c", str(failure).partition("; run ")[2]], check=True)
        assert load_host_policy({}, str(etc)).files == files


def test_a_link_above_an_absent_policy_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "etc").symlink_to("real")
    failure = failure_of(lambda: load_host_policy({}, str(tmp_path / "etc")))
    assert (failure.status, failure.why) == (Status.NO_POLICY, "there is no policy on this host")
    write(tmp_path / "real" / "policy.yaml")
    assert load_host_policy({}, str(tmp_path / "etc")).files == (str(tmp_path / "etc/policy.yaml"),)


@needs_root
def test_check_follows_a_link_wherever_it_leads(tmp_path: Path) -> None:
    """As it looks at no folder: at the owner and the mode of what is read."""
    real = write(tmp_path / "real.yaml")
    link = tmp_path / "link.yaml"
    link.symlink_to(real)
    os.chown(link, NOBODY, NOBODY, follow_symlinks=False)
    assert check_policy([str(link)]).files == (str(link),)
    real.chmod(0o666)
    assert failure_of(lambda: check_policy([str(link)])).status == Status.UNSAFE


def test_relative_path(etc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(etc / "policy.d")
    assert load_policy(["../policy.yaml"]).files == ("../policy.yaml",)
    etc.chmod(0o777)
    assert failure_of(lambda: load_policy(["../policy.yaml"])).what == str(etc)


def test_odd_file_names_are_shown_in_one_line(etc: Path) -> None:
    os.close(os.open(os.fsencode(etc / "policy.d") + b"/\xff\n.yaml", os.O_CREAT, 0o644))
    with pytest.raises(PolicyInvalid) as caught:
        load_host_policy({}, str(etc))
    assert str(caught.value.errors[0]).isprintable()
    assert caught.value.errors[0].file.endswith("xff\\n.yaml")


def test_size_is_of_all_files(etc: Path) -> None:
    write(etc / "policy.d" / "a.yaml", GOOD + "#" * 200_000)
    write(etc / "policy.yaml", GOOD + "#" * 100_000)
    with pytest.raises(PolicyInvalid) as caught:
        load_host_policy({}, str(etc))
    assert [str(error) for error in caught.value.errors] == [
        f"{etc}/policy.yaml:1:1: the policy is larger than 256 KiB in all"
    ]


def test_nothing_stays_open(etc: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    load_host_policy({}, str(etc))
    (etc / "policy.yaml").chmod(0o666)
    failure_of(lambda: load_host_policy({}, str(etc)))
    (etc / "policy.yaml").unlink()
    for target in ("policy.d/../policy.yaml", "nowhere", "/", "policy.d", "../etc/../etc/."):
        (etc / "policy.yaml").symlink_to(target)
        failure_of(lambda: load_host_policy({}, str(etc)))
        (etc / "policy.yaml").unlink()
    etc.chmod(0o777)
    failure_of(lambda: load_host_policy({}, str(etc)))
    assert len(os.listdir("/proc/self/fd")) == before
