"""Files are written whole or not at all, whatever crashes, and however many write at once."""

import os
import signal
import stat
import subprocess
import sys
import threading

import pytest

from dpx import _files
from dpx._files import write_atomically, write_text_atomically


def test_what_is_written_is_read(tmp_path):
    path = write_text_atomically(tmp_path / "new" / "folder" / "text.json", "é\n")
    assert path.read_text(encoding="utf-8") == "é\n" and list(path.parent.iterdir()) == [path]
    assert write_atomically(str(path), lambda half: half.write_bytes(b"other")) == path
    assert path.read_bytes() == b"other" and list(path.parent.iterdir()) == [path]


def test_the_name_in_between_keeps_the_suffix(tmp_path):
    seen = []
    write_atomically(tmp_path / "figure.png", lambda half: seen.append(half))
    assert seen[0].suffix == ".png" and seen[0].parent == tmp_path and seen[0].name.startswith(".")


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
def test_permissions_are_as_asked(tmp_path):
    of = lambda path: stat.S_IMODE(path.stat().st_mode)
    secret = write_text_atomically(tmp_path / "secret", "", mode=0o600)
    (tmp_path / "plain").write_text("")
    usual = write_text_atomically(tmp_path / "usual", "")
    assert of(secret) == 0o600 and of(usual) == of(tmp_path / "plain")
    # as the new one is written, not as the old one was
    assert of(write_text_atomically(secret, "new", mode=0o600)) == 0o600


@pytest.mark.parametrize("where", ["save", "fsync", "replace"])
def test_guarantee_a_failure_leaves_the_old_file(tmp_path, monkeypatch, where):
    path = write_text_atomically(tmp_path / "text", "old")

    def fail(*arguments):
        raise OSError("no space left on device")

    def save(half):
        half.write_text("ne")
        if where == "save":
            fail()

    if where != "save":
        monkeypatch.setattr(os, where, fail)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, save)
    monkeypatch.undo()
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_all_is_on_the_disk_before_it_has_the_name(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append("fsync"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda *paths: (order.append("replace"), replace(*paths)))
    write_text_atomically(tmp_path / "text", "new")
    assert order[:2] == ["fsync", "replace"]


KILLED = """
import importlib.util, os, signal, sys

spec = importlib.util.spec_from_file_location("files", sys.argv[2])
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)

def save(half):
    with open(half, "w") as file:
        file.write("ne")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

files.write_atomically(sys.argv[1], save)
"""


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_guarantee_a_kill_in_the_middle_leaves_the_old_file(tmp_path):
    path = write_text_atomically(tmp_path / "text", "old")
    # of the file alone: to import dpx takes seconds
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), _files.__file__], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    # what the dead process left is in nobody's way
    assert write_text_atomically(path, "new").read_text() == "new"


def test_threads_that_write_one_file_do_not_meet(tmp_path):
    path, texts = tmp_path / "text", [str(i) * 20_000 for i in range(8)]
    failures = []

    def write(text):
        try:
            for _ in range(10):
                write_text_atomically(path, text)
                assert path.read_text() in texts
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and path.read_text() in texts and list(tmp_path.iterdir()) == [path]
