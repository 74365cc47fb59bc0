import os

import pytest

from obmlite.io.filesystem import is_remote, is_remote_kind, kind_of

# As in proc_pid_mountinfo(5): optional fields before the hyphen, and blanks in paths written as \040.
MOUNTS = r"""
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:26 / /sys/fs/cgroup rw shared:9 master:2 propagate_from:3 - cgroup2 cgroup2 rw
36 22 0:45 /export/a - /mnt/a\040-\040b rw,noatime - nfs4 host:/export/a rw,vers=4.2
37 22 0:46 / /mnt/bucket rw - fuse.gcsfuse gcsfuse rw
38 22 0:47 / /mnt/no-options rw - 9p share rw
39 22 0:48
40 22 0:49 / /mnt/cut rw shared:1 -
""".splitlines()


@pytest.mark.parametrize(
    ("device", "kind"),
    [
        ((254, 0), "ext4"),
        ((0, 26), "cgroup2"),
        ((0, 46), "fuse.gcsfuse"),
        ((0, 47), "9p"),
        ((0, 48), ""),
        ((0, 49), ""),
        ((8, 1), ""),
        ((54, 0), ""),
    ],
)
def test_the_kind_of_a_mount(device, kind):
    assert kind_of(MOUNTS, *device) == kind
    assert kind_of([], *device) == ""


def test_which_kinds_are_elsewhere():
    for kind in ("nfs", "nfs4", "9p", "virtiofs", "lustre", "ceph", "cifs", "fuse", "fuse.sshfs", "fuseblk"):
        assert is_remote_kind(kind), kind
    for kind in ("ext4", "xfs", "btrfs", "tmpfs", "overlay", "apfs", "fusectl", ""):
        assert not is_remote_kind(kind), kind


def test_what_the_system_says_of_a_directory(tmp_path):
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        found = is_remote(descriptor)
        device = os.fstat(descriptor).st_dev
    finally:
        os.close(descriptor)
    if not os.path.exists("/proc/self/mountinfo"):
        assert not found
        return
    with open("/proc/self/mountinfo") as mounts:
        kinds = {
            line.split(" - ", 1)[1].split()[0]
            for line in mounts
            if line.split()[2] == f"{os.major(device)}:{os.minor(device)}"
        }
    assert found == any(map(is_remote_kind, kinds))
    with pytest.raises(OSError, match="descriptor"):
        is_remote(descriptor)
