"""All the tests, in two processes beside each other: most of their time they wait.

    halves.py [ARGUMENTS OF PYTEST]     run them
    halves.py --keep                    put what this machine has measured into durations.json

Each process takes the next file of tests when it has run one, the longest first, so that both end
at about the same time. How long a file takes is what the last run on this machine has measured,
kept in the folder of PYQEMU_LAB or below ~/.cache; durations.json says it of a file that was never
run here, and a file that nobody has timed counts as the mean. lab.half is what each process does.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
KEPT = TESTS / "lab" / "durations.json"
# NOTE: not as a script, which has its own folder in sys.path: lab/qemu.py is not the library.
HALF = f"import sys; sys.path[:0] = [{str(TESTS)!r}]; from lab.half import main; sys.exit(main())"


def cached() -> Path:
    """Return the file of what this machine has measured."""
    lab = os.environ.get("PYQEMU_LAB") or Path.home() / ".cache" / "pyqemu-ifup-lab"
    return Path(lab, "durations.json")


def read(path: Path) -> dict[str, float]:
    """Return the seconds of each file of tests that `path` tells of; none if it is not there."""
    found: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    return found


def write(path: Path, seconds: Mapping[str, float]) -> None:
    """Write the seconds of each file of tests to `path`, as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(dict(sorted(seconds.items())), indent=1) + "\n")
    new.replace(path)


def longest_first(files: Iterable[str], seconds: Mapping[str, float]) -> list[str]:
    """Return the files in the order in which they are taken; one without seconds is as the mean."""
    files = list(files)
    known = [seconds[file] for file in files if file in seconds]
    mean = sum(known) / len(known) if known else 0.0
    return sorted(files, key=lambda file: (-seconds.get(file, mean), file))


@dataclass(frozen=True)
class Queue:
    """What the two halves share, in a folder: which files are taken, and how long each took."""

    folder: Path

    def take(self, files: Iterable[str]) -> str | None:
        """Take the first of `files` that nobody has taken; return it, or None if there is none."""
        with open(self.folder / "taken", "a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            taken = set(file.read().splitlines())
            found = next((each for each in files if each not in taken), None)
            if found is not None:
                file.write(f"{found}\n")
        return found

    def ran(self, half: str, file: str, seconds: float) -> None:
        """Note how long the half of that name took for a file."""
        with open(self.folder / half, "a") as ran:
            ran.write(f"{json.dumps([file, round(seconds, 1)])}\n")

    def times(self, half: str) -> dict[str, float]:
        """Return the seconds of each file that a half has run."""
        path = self.folder / half
        lines = path.read_text().splitlines() if path.exists() else []
        return dict(json.loads(line) for line in lines)


def run(arguments: Sequence[str]) -> int:
    """Run both halves; print the first as it goes, and then what the second has printed.

    Returns 0, or the exit status of a half that has failed.
    """
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as printed:
        first, second = (
            [sys.executable, "-c", HALF, name, folder, *arguments] for name in ("first", "second")
        )
        with subprocess.Popen(
            second, cwd=TESTS.parent, stdin=subprocess.DEVNULL, stdout=printed,
            stderr=subprocess.STDOUT,
        ) as other:  # fmt: skip
            try:
                status = subprocess.run(first, cwd=TESTS.parent).returncode
                status = other.wait() or status
            except BaseException:
                other.send_signal(signal.SIGINT)
                raise
        printed.seek(0)
        sys.stdout.flush()
        sys.stdout.buffer.write(printed.read())
        sys.stdout.buffer.flush()
        halves = [Queue(Path(folder)).times(name) for name in ("first", "second")]
    print("halves: {:.0f} s and {:.0f} s of tests".format(*(sum(each.values()) for each in halves)))
    write(cached(), read(cached()) | halves[0] | halves[1])
    return status


def keep() -> int:
    """Put into durations.json what this machine has measured of the files that are there."""
    seconds = read(KEPT) | read(cached())
    there = {file: round(each) for file, each in seconds.items() if (TESTS.parent / file).exists()}
    write(KEPT, there)
    print(f"halves: {KEPT}: {len(there)} files, {sum(there.values())} s")
    return 0


if __name__ == "__main__":
    sys.exit(keep() if sys.argv[1:] == ["--keep"] else run(sys.argv[1:]))
