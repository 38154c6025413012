"""The files of a process's own log."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llumnix.observe import own_log

CODE = """
import faulthandler, os, subprocess, sys
from pathlib import Path
from llumnix.observe.own_log import keep_own_log
faulthandler.enable(2)
print("before")
print(keep_own_log(Path(sys.argv[1]), sys.argv[2]))
print("printed")
os.write(2, b"to standard error\\n")
subprocess.run(["sh", "-c", "echo of a child"])
sys.stdout.flush()
os.abort()
"""


NO_PID = 2**22
"""No process has it: Linux gives smaller ones alone."""


def run(folder: Path, name: str) -> str:
    words = [sys.executable, "-c", CODE, str(folder), name]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout


def test_all_that_a_process_and_its_children_write_is_in_its_file(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "logs"
    assert run(folder, "i1") == "before\n"
    (path,) = folder.iterdir()
    assert path.name.startswith("i1-")
    text = path.read_text()
    for part in (str(path), "printed", "to standard error", "of a child", "Fatal Python error"):
        assert part in text
    assert path.stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700


def test_the_last_processes_of_a_name_are_kept(tmp_path: Path) -> None:
    for number in range(own_log.RUNS_MAX + 2):
        (tmp_path / f"i1-2020010{number}T000000-{NO_PID}.log").write_text("old")
        (tmp_path / f"i1-2020010{number}T000000-{NO_PID}.log.1").write_text("older")
    (tmp_path / "i10-20200101T000000-7.log").write_text("another's")
    (tmp_path / "i1-x-20200101T000000-7.log").write_text("another's")
    run(tmp_path, "i1")
    names = sorted(p.name for p in tmp_path.iterdir())
    assert [n for n in names if "2020" not in n], "the new one"
    kept = range(3, own_log.RUNS_MAX + 2)
    assert [n for n in names if n.startswith("i1-2020")] == [
        f"i1-2020010{n}T000000-{NO_PID}.log{end}" for n in kept for end in ("", ".1")
    ]
    assert {"i10-20200101T000000-7.log", "i1-x-20200101T000000-7.log"} <= set(names)


def test_the_files_of_a_process_that_runs_are_kept(tmp_path: Path) -> None:
    """Two deployments may share the folder, and one of them may start its engines often."""
    mine = f"i1-20200101T000000-{os.getpid()}.log"
    for name in (mine, f"{mine}.1", "i1-20200101T000000-mine.log"):
        (tmp_path / name).write_text("old")
    for number in range(2, own_log.RUNS_MAX + 2):
        (tmp_path / f"i1-2020010{number}T000000-{NO_PID}.log").write_text("old")
    run(tmp_path, "i1")
    names = {p.name for p in tmp_path.iterdir()}
    assert {mine, f"{mine}.1", "i1-20200101T000000-mine.log"} <= names
    assert f"i1-20200102T000000-{NO_PID}.log" not in names


LONG_CODE = """
import os, subprocess, sys, time
from pathlib import Path
from llumnix.observe import own_log
own_log.FILE_MAX_BYTES, own_log.LOOK_EVERY_S = 1000, 0.01
said = os.dup(1)
sys.stdout.reconfigure(line_buffering=True)
path = own_log.keep_own_log(Path(sys.argv[1]), "i1")
child = subprocess.Popen(["sh", "-c", "while read line; do echo $line; done"], stdin=-1)

def of_child(text):
    child.stdin.write(text.encode() + b"\\n")
    child.stdin.flush()

def says(what, text, file=None):
    # Until it is there: what comes just when the file is emptied may be lost.
    until = time.monotonic() + 20
    while True:
        what(text)
        time.sleep(0.03)
        for one in [file] if file else path.parent.glob("i1-*"):
            try:
                if text in one.read_text():
                    return
            except FileNotFoundError:
                pass  # It has another name now.
        assert time.monotonic() < until, text

print("before", flush=True)
path.unlink()
says(lambda text: None, "before")
for _ in range(3):
    print("x" * 2000)
    says(of_child, "y" * 2000)
says(print, "of the parent")
says(of_child, "of the child")
says(print, "put aside", path)
os.rename(path, path.parent / "put aside")
says(print, "at the end", path)
child.stdin.close()
child.wait()
os.write(said, f"{path.name} {path.stat().st_size}".encode())
"""


def test_a_log_that_somebody_removes_is_made_again_and_stays_within_its_bound(
    tmp_path: Path,
) -> None:
    """Its children have the removed file open, and what they write comes to the new one."""
    words = [sys.executable, "-c", LONG_CODE, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)
    assert not done.returncode, [p.read_text()[-2000:] for p in tmp_path.iterdir()]
    name, size = done.stdout.split()
    assert int(size) <= 1000
    names = {p.name for p in tmp_path.iterdir()}
    copies = {f"{name}.{n}" for n in range(1, own_log.COPIES_MAX + 1)}
    assert names - copies == {name, "put aside"}
    assert (tmp_path / "put aside").read_text(), "what was renamed stays"


def test_a_large_file_is_copied_and_emptied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_log, "FILE_MAX_BYTES", 8)
    path = tmp_path / "log"
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for number in range(own_log.COPIES_MAX + 3):
        os.write(file, f"{number} of many\n".encode())
        own_log.cut(path)
        assert path.read_bytes() == b""
    os.write(file, b"short\n")
    os.close(file)
    own_log.cut(path)
    assert path.read_text() == "short\n", "where an appending writer goes on"
    copies = [(tmp_path / f"log.{n}").read_text() for n in range(1, own_log.COPIES_MAX + 1)]
    last = own_log.COPIES_MAX + 2
    assert copies == [f"{last - n} of many\n" for n in range(own_log.COPIES_MAX)]
    assert not (tmp_path / f"log.{own_log.COPIES_MAX + 1}").exists()


def test_on_a_full_disk_the_copies_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_log, "FILE_MAX_BYTES", 8)
    path = tmp_path / "log"
    for number in range(3):
        path.write_text(f"{number} of many\n")
        own_log.cut(path)

    def full(source: Path, copy: Path) -> None:
        copy.write_text("torn")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(own_log.shutil, "copyfile", full)
    path.write_text("more of many\n")
    for _ in range(own_log.COPIES_MAX):
        with pytest.raises(OSError, match="No space"):
            own_log.cut(path)
    copies = {p.name: p.read_text() for p in tmp_path.iterdir()}
    assert copies == {
        "log": "more of many\n",
        "log.1": "2 of many\n",
        "log.2": "1 of many\n",
        "log.3": "0 of many\n",
    }
