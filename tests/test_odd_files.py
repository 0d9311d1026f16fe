"""Files in odd places: other owners, names in no encoding, little address space, overlayfs, links, and pickling."""

from __future__ import annotations

import copy
import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.cli_support import click_run
from helpers.support import check_filled, fill, make_file, run_python

import kvmmap
from kvmmap.storage.posix import PosixFile

ODD = os.fsdecode(b"caf\xe9 \xff.kvm")
NAMES = [ODD, "ü" * 125 + ".kvm", "n" * 251 + ".kvm", "日" * 83 + ".kvm", "a\nb\tc.kvm", "-rf.kvm", "a#b?c%20d.kvm"]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_any_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with make_file(path, 300) as cache:
        cache.flush()
        cache.metadata = {"a": 1}
    with kvmmap.open(path, "a") as cache:
        fill(cache, 600)
    kvmmap.resize(path, 800)
    kvmmap.compact(path)
    with kvmmap.open(path) as cache:
        check_filled(cache, 600)
        assert cache.verify().sound
    short = tmp_path / "short.kvm"
    kvmmap.fork(path, short).close()
    for make in (kvmmap.repair, kvmmap.copy):
        kvmmap.remove(path)
        make(short, path)
    kvmmap.copy(short, path, overwrite=True)
    kvmmap.export_tensors(path, path.with_suffix(".safetensors") if len(os.fsencode(name)) < 240 else tmp_path / "t")
    assert sorted(kvmmap.find(tmp_path)) == sorted([str(path), str(short)])
    for command in ("inspect", "verify", "tokens"):
        assert click_run(command, "--", str(path)).exit_code == 0
    assert click_run("gc", tmp_path, "--max-bytes", "0", "--yes").exit_code == 0
    assert kvmmap.find(tmp_path) == []


@pytest.mark.parametrize("name", [ODD, "日" * 80 + ".zarr"], ids=ascii)
def test_groups_of_any_name(tmp_path: Path, name: str) -> None:
    source, group = tmp_path / "a.kvm", tmp_path / name.replace(".kvm", ".zarr")
    make_file(source, 300).close()
    kvmmap.copy(source, group)
    with kvmmap.open(group, "a") as cache:
        fill(cache, 400)
    with kvmmap.open(group) as cache:
        check_filled(cache, 400)
    kvmmap.remove(group)
    assert kvmmap.find(tmp_path) == [str(source)]


CHANGES: dict[str, Callable[[Path], Path]] = {
    "resize": lambda path: kvmmap.resize(path, 900) or path,
    "compact": lambda path: kvmmap.compact(path) or path,
    "repair": lambda path: Path(kvmmap.repair(path, path.with_name("new.kvm")).new_path),
    "overwrite": lambda path: make_file(path, overwrite=True).close() or path,
    "copy": lambda path: replaced_by_copy(path),
}


def replaced_by_copy(path: Path) -> Path:
    make_file(path.with_name("other.kvm"), 5).close()
    kvmmap.copy(path.with_name("other.kvm"), path, overwrite=True)
    return path


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o400])
@pytest.mark.parametrize("how", CHANGES)
def test_owner_and_mode_are_kept(tmp_path: Path, how: str, mode: int) -> None:
    path = tmp_path / "cache.kvm"
    make_file(path, 300).close()
    path.chmod(mode)
    if os.geteuid() == 0:
        os.chown(path, 12345, 23456)
    elif not mode & 0o200:
        pytest.skip("the owner may not write")
    before = path.stat()
    after = CHANGES[how](path).stat()
    assert (after.st_uid, after.st_gid, after.st_mode) == (before.st_uid, before.st_gid, before.st_mode)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another group")
def test_another_groups_permissions_are_not_given_to_mine(tmp_path: Path) -> None:
    path = tmp_path / "cache.kvm"
    path.write_bytes(b"x")
    os.chown(path, 12345, 23456)
    path.chmod(0o660)
    (tmp_path / "mine").write_bytes(b"y")
    os.chown(tmp_path / "mine", 12345, 12345)
    theirs, mine = (PosixFile.open(str(tmp_path / name), writable=False) for name in ("cache.kvm", "mine"))
    child = os.fork()
    if child == 0:
        os.setgid(12345)
        os.setuid(12345)
        mine.copy_access(theirs)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert (tmp_path / "mine").stat().st_mode & 0o777 == 0o600
    theirs.close()
    mine.close()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickling_says_what_to_do(tmp_path: Path, protocol: int) -> None:
    with make_file(tmp_path / "cache.kvm", 3) as writer, kvmmap.open(tmp_path / "cache.kvm") as reader:
        for what in (writer, reader, writer.layers[0]):
            with pytest.raises(kvmmap.KvmmapError, match=r"cache\.kvm: .*open\(path\) it in the worker"):
                pickle.dumps(what, protocol)
    with kvmmap.QuantizedKvCache(1, 8, 1, 4) as cache, pytest.raises(kvmmap.KvmmapError, match="keep it in a file"):
        copy.deepcopy(cache)
    with pytest.raises(kvmmap.KvmmapError, match="keep it in a file"):
        copy.copy(kvmmap.QuantizedKvLayer(8, 1, 4))


LITTLE_SPACE = """
import resource, sys, kvmmap
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 28),) * 2)
with kvmmap.open(sys.argv[1], verify="none", record_use=False) as cache:
    assert cache.seq_len == 600
    assert cache.verify().sound
    for read in (cache.layers[0].read_keys, lambda: cache.token_ids, lambda: cache.layers[0].key_codes):
        try:
            read()
        except OSError as error:
            assert "address space" in str(error) and sys.argv[1] in str(error)
        else:
            raise AssertionError
for mode in ("r", "a"):
    try:
        kvmmap.open(sys.argv[1], mode)
    except OSError as error:
        assert sys.argv[1] in str(error)
    else:
        raise AssertionError
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
def test_verify_needs_no_map(tmp_path: Path) -> None:
    path = tmp_path / "cache.kvm"
    make_file(path, 600, capacity=20_000_000).close()
    run_python(LITTLE_SPACE, path)


def test_errors_of_the_system_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "cache.kvm"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with make_file(path, 300) as cache:
        cache.flush()
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            with pytest.raises(OSError, match="File too large") as caught:
                fill(cache, 500)
            assert caught.value.filename == str(path)
            with pytest.raises(OSError, match="File too large") as caught:
                make_file(tmp_path / "other.kvm")
            assert "other.kvm" in caught.value.filename
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        fill(cache, 600)
    with kvmmap.open(path) as cache:
        check_filled(cache, 600)
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)
    for spare in range(5):
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) - 1 + spare, descriptors[1]))
        told = str(path)
        try:
            kvmmap.open(path, "a").close()
        except OSError as error:
            told = str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, descriptors)
        assert str(path) in told


def test_a_link_to_a_group_is_removed_and_not_the_group(tmp_path: Path) -> None:
    group, link = tmp_path / "a.zarr", tmp_path / "link.zarr"
    kvmmap.create(group, num_layers=1, capacity=8, num_kv_heads=1, head_dim=8).close()
    link.symlink_to(group)
    kvmmap.remove(link)
    assert not link.is_symlink()
    kvmmap.open(group).close()


OVERLAY = """
set -e
cd "$1"
mkdir lower merged space
mount -t tmpfs none space
mkdir space/upper space/work
cp "$2" lower/cache.kvm
mount -t overlay -o lowerdir=lower,upperdir=space/upper,workdir=space/work none merged
exec "$3" -W error -c '
import os, sys, numpy, kvmmap
sys.path.insert(0, sys.argv[2])
from helpers.support import check_filled, fill
path = sys.argv[1]
with kvmmap.open(path) as reader:
    check_filled(reader, 600)
    assert not os.listdir("space/upper"), "reading copied the file up"
    with kvmmap.open(path, "a") as writer, kvmmap.open(path) as late:
        fill(writer, 700)
        try:
            reader.refresh()
            check_filled(reader, 700)
        except kvmmap.CacheChangedError as error:
            assert "overlayfs" in str(error)
        check_filled(reader, 600) if len(reader) == 600 else None
        late.refresh()
        check_filled(late, 700)
print("fine")
' merged/cache.kvm "$4"
"""


def test_overlayfs(namespace: list[str], tmp_path: Path) -> None:
    path = tmp_path / "cache.kvm"
    make_file(path, 600).close()
    probe = "cd $1 && mkdir l u m && mount -t tmpfs none u && mkdir u/u u/w && "
    probe += "mount -t overlay -o lowerdir=l,upperdir=u/u,workdir=u/w none m"
    (tmp_path / "probe").mkdir()
    may = subprocess.run([*namespace, "sh", "-c", probe, "sh", tmp_path / "probe"], capture_output=True, check=False)
    if may.returncode:
        pytest.skip("may not mount overlayfs here")
    (tmp_path / "disk").mkdir()
    done = subprocess.run(
        [*namespace, "sh", "-c", OVERLAY, "sh", tmp_path / "disk", path, sys.executable, Path(__file__).parent],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr
