"""Atomic files and folders: whatever interrupts, the old one or the new one, and nothing else."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from steerrec.errors import StorageError
from steerrec.files import atomic_file, atomic_folder, recover_folder, write_json


class Interruption(Exception):
    pass


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def umask():
    """New files are for the owner to write, the group to read, and nobody else."""
    old = os.umask(0o027)
    yield
    os.umask(old)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def full_disk():
    return OSError(errno.ENOSPC, "No space left on device")


# --- files


def write_half(path, error):
    with atomic_file(path) as temporary:
        temporary.write_text("half")
        raise error


@pytest.mark.parametrize("there", [True, False])
def test_a_file_appears_whole_when_the_block_ends(tmp_path, there):
    path = tmp_path / "new" / "file.txt"
    if there:
        path.parent.mkdir()
        path.write_text("old")
    with atomic_file(path) as temporary:
        assert temporary.parent == path.parent
        temporary.write_text("half")
        assert path.exists() is there
        assert not there or path.read_text() == "old"
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert names(path.parent) == ["file.txt"]


@pytest.mark.parametrize("error", [Interruption, KeyboardInterrupt])
@pytest.mark.parametrize("there", [True, False])
def test_an_interrupted_file_leaves_the_old_one(tmp_path, error, there):
    path = tmp_path / "file.txt"
    if there:
        path.write_text("old")
    with pytest.raises(error):
        write_half(path, error)
    assert names(tmp_path) == ["file.txt"] * there
    assert not there or path.read_text() == "old"


def test_a_full_disk_is_one_clear_line(tmp_path):
    path = tmp_path / "file.txt"
    with pytest.raises(StorageError, match=r"cannot write .*file\.txt: No space left") as caught:
        write_half(path, full_disk())
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == []


def test_a_folder_in_the_place_of_a_file_is_refused_and_kept(tmp_path):
    (tmp_path / "file.txt" / "inside").mkdir(parents=True)
    with pytest.raises(StorageError, match=r"cannot write .*file\.txt"):
        write_json(tmp_path / "file.txt", {})
    assert names(tmp_path) == ["file.txt"]
    assert names(tmp_path / "file.txt") == ["inside"]


@pytest.mark.parametrize("atomic", [atomic_file, atomic_folder])
def test_a_file_in_the_place_of_the_parent_is_refused(tmp_path, atomic):
    (tmp_path / "parent").write_text("a file")
    with pytest.raises(StorageError, match="cannot write"), atomic(tmp_path / "parent" / "child"):
        pytest.fail("the block ran")
    assert (tmp_path / "parent").read_text() == "a file"


@pytest.mark.usefixtures("umask")
def test_permission_bits_of_a_file_follow_the_umask(tmp_path):
    with atomic_file(tmp_path / "file.txt") as temporary:
        temporary.write_text("whole")
    assert mode(tmp_path / "file.txt") == 0o640


def test_json_is_written_as_people_read_it(tmp_path):
    write_json(tmp_path / "value.json", {"title": "Amélie", "k": 10})
    text = (tmp_path / "value.json").read_text(encoding="utf-8")
    assert text == '{\n  "title": "Amélie",\n  "k": 10\n}\n'


# --- folders


def write_half_a_folder(path, error):
    with atomic_folder(path) as temporary:
        (temporary / "half.txt").write_text("half")
        raise error


@pytest.fixture
def old(tmp_path):
    """A folder with something in it, alone in its parent."""
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "old.txt").write_text("old")
    return folder


def test_a_folder_takes_the_place_of_the_old_one_whole(old):
    with atomic_folder(old) as temporary:
        (temporary / "new.txt").write_text("new")
        assert names(old) == ["sub"]
    assert names(old) == ["new.txt"]
    assert names(old.parent) == ["folder"]


def test_a_folder_is_made_with_its_parents(tmp_path):
    with atomic_folder(tmp_path / "a" / "b") as temporary:
        (temporary / "new.txt").write_text("new")
    assert names(tmp_path / "a") == ["b"]
    assert names(tmp_path / "a" / "b") == ["new.txt"]


@pytest.mark.parametrize("error", [Interruption, KeyboardInterrupt])
def test_an_interrupted_folder_leaves_the_old_one(old, error):
    with pytest.raises(error):
        write_half_a_folder(old, error)
    assert names(old.parent) == ["folder"]
    assert (old / "sub" / "old.txt").read_text() == "old"


def test_an_interrupted_folder_leaves_nothing_where_nothing_was(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_half_a_folder(tmp_path / "folder", KeyboardInterrupt)
    assert names(tmp_path) == []


@pytest.mark.parametrize("moves", [0, 1])
@pytest.mark.parametrize("error", [full_disk(), KeyboardInterrupt()])
def test_the_old_folder_comes_back_when_the_exchange_fails(old, monkeypatch, moves, error):
    """The exchange moves the old folder away, then the new one in."""
    replace, left = Path.replace, iter([True] * moves + [False])

    def failing_replace(path, target):
        if not next(left, True):
            raise error
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", failing_replace)
    expected = StorageError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected), atomic_folder(old) as temporary:
        (temporary / "new.txt").write_text("new")
    assert names(old.parent) == ["folder"]
    assert (old / "sub" / "old.txt").read_text() == "old"


CUT_OFF = """
import os, sys
from pathlib import Path
from steerrec.files import atomic_folder

replace = Path.replace
Path.replace = lambda path, target: (replace(path, target), os._exit(9))
with atomic_folder(sys.argv[1]) as temporary:
    (temporary / "half.txt").write_text("half")
"""


@pytest.fixture
def cut_off(old):
    """What is left where the process dies between the two moves: the old folder is aside."""
    done = subprocess.run([sys.executable, "-P", "-c", CUT_OFF, old], check=False)
    assert done.returncode == 9
    assert not old.exists()
    return old


def test_a_folder_that_a_dead_process_moved_aside_is_put_back(cut_off):
    recover_folder(cut_off)
    assert (cut_off / "sub" / "old.txt").read_text() == "old"


def test_the_next_folder_replaces_one_that_was_moved_aside(cut_off):
    with pytest.raises(KeyboardInterrupt):
        write_half_a_folder(cut_off, KeyboardInterrupt)
    assert (cut_off / "sub" / "old.txt").read_text() == "old"
    with atomic_folder(cut_off) as temporary:
        (temporary / "new.txt").write_text("new")
    assert names(cut_off) == ["new.txt"]


def test_nothing_is_put_back_over_a_folder_or_out_of_another_ones_place(old):
    for other in (".folder.1234.old", ".folder2.1234.old"):
        (old.parent / other).mkdir()
    recover_folder(old)
    assert names(old) == ["sub"]
    recover_folder(old.parent / "fold*")
    recover_folder(old.parent / "absent")
    assert names(old.parent) == [".folder.1234.old", ".folder2.1234.old", "folder"]


def test_a_file_in_the_place_of_a_folder_is_refused_and_kept(tmp_path):
    (tmp_path / "folder").write_text("mine")
    with pytest.raises(StorageError, match="cannot write"), atomic_folder(tmp_path / "folder"):
        pytest.fail("the block ran")
    assert names(tmp_path) == ["folder"]
    assert (tmp_path / "folder").read_text() == "mine"


def test_a_link_to_a_folder_stays_a_link(old):
    link = old.with_name("link")
    link.symlink_to(old, target_is_directory=True)
    with atomic_folder(link) as temporary:
        (temporary / "new.txt").write_text("new")
    assert names(old.parent) == ["folder", "link"]
    assert link.is_symlink()
    assert names(old) == ["new.txt"]


@pytest.mark.usefixtures("umask")
def test_permission_bits_of_a_folder_and_all_in_it_follow_the_umask(tmp_path):
    with atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "sub").mkdir()
        save_file({"x": torch.ones(1)}, temporary / "sub" / "x.safetensors")
        write_json(temporary / "sub" / "x.json", {})
    folder = tmp_path / "folder"
    assert [mode(path) for path in (folder, folder / "sub")] == [0o750, 0o750]
    assert [mode(path) for path in sorted((folder / "sub").iterdir())] == [0o640, 0o640]
