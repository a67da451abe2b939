"""How much memory there is: of the machine, and of every cgroup around the process."""

from pathlib import Path

import pytest

from lastgood._staging import free_memory
from lastgood._staging.free_memory import available_memory, cgroup_available, machine_available

MEMINFO = """\
MemTotal:       24617712 kB
MemFree:          912384 kB
MemAvailable:   23069876 kB
Buffers:           51252 kB
Cached:         22014012 kB
SwapFree:              0 kB
"""
STAT_V2 = """\
anon 1468006400
file 734003200
shmem 209715200
inactive_anon 104857600
active_anon 1468006400
inactive_file 314572800
active_file 209715200
unevictable 0
"""
STAT_V1 = """\
cache 734003200
rss 1468006400
inactive_file 1048576
active_file 2097152
hierarchical_memory_limit 9223372036854771712
total_inactive_file 314572800
total_active_file 209715200
"""


def test_the_machines_memory_is_what_the_kernel_calls_available() -> None:
    assert machine_available(MEMINFO) == 23069876 * 1024
    assert machine_available("MemTotal: 1 kB\n") is None
    assert machine_available("") is None


@pytest.mark.parametrize(
    ("limit", "used", "stat", "expected"),
    [
        ("4294967296\n", "2411724800\n", STAT_V2, 4294967296 - 2411724800 + 314572800 + 209715200),
        ("4294967296\n", "2411724800\n", STAT_V1, 4294967296 - 2411724800 + 1048576 + 2097152),
        ("4294967296\n", "2411724800\n", "", 4294967296 - 2411724800),
        ("1000\n", "5000\n", "", 0),
        ("0\n", "0\n", "", 0),
        ("max\n", "2411724800\n", STAT_V2, None),
        ("9223372036854771712\n", "2411724800\n", STAT_V1, None),
    ],
)
def test_a_cgroup_leaves_what_is_below_its_limit_and_what_the_kernel_gives_up(
    limit: str, used: str, stat: str, expected: int | None
) -> None:
    assert cgroup_available(limit, used, stat) == expected


class Machine:
    """Files of a machine that is not this one."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._root = root
        (root / "cgroup").mkdir()
        real = free_memory._read
        monkeypatch.setattr(free_memory, "_CGROUP_ROOT", str(root / "cgroup"))
        monkeypatch.setattr(
            free_memory,
            "_read",
            lambda path: real(str(root / path.removeprefix("/")) if path.startswith("/proc/") else path),
        )
        self.write("proc/meminfo", MEMINFO)

    def write(self, name: str, text: str) -> None:
        path = self._root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def limit(self, group: str, limit: str, used: str, stat: str = "") -> None:
        """A group of version 2."""
        self.write(f"cgroup/{group}memory.max", limit)
        self.write(f"cgroup/{group}memory.current", used)
        self.write(f"cgroup/{group}memory.stat", stat)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_without_cgroups_the_machine_alone_counts(machine: Machine) -> None:
    assert available_memory() == 23069876 * 1024
    machine.write("proc/self/cgroup", "0::/user.slice\n")
    assert available_memory() == 23069876 * 1024


def test_where_nothing_is_known_nothing_is_said(machine: Machine) -> None:
    machine.write("proc/meminfo", "")
    assert available_memory() is None


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ({"jobs/mine/": ("5000", "1000")}, 4000),
        ({"jobs/mine/": ("max", "1000"), "jobs/": ("9000", "2000")}, 7000),
        ({"jobs/mine/": ("5000", "1000"), "jobs/": ("3000", "2000")}, 1000),
        ({"jobs/mine/": ("max", "1000"), "jobs/": ("max", "2000")}, 23069876 * 1024),
        ({"": ("700", "600")}, 100),
    ],
)
def test_the_tightest_of_all_nested_groups_counts(
    machine: Machine, groups: dict[str, tuple[str, str]], expected: int
) -> None:
    machine.write("cgroup/cgroup.controllers", "memory")
    machine.write("proc/self/cgroup", "0::/jobs/mine\n")
    for group, (limit, used) in groups.items():
        machine.limit(group, limit, used)
    assert available_memory() == expected


def test_a_container_that_is_shown_the_path_of_its_host_finds_its_own_root(machine: Machine) -> None:
    machine.write("cgroup/cgroup.controllers", "memory")
    machine.write("proc/self/cgroup", "0::/kubepods.slice/pod-1/container:2\n")
    machine.limit("", "5000", "1000", STAT_V2)
    assert available_memory() == 5000 - 1000 + 314572800 + 209715200


def test_groups_of_version_1(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "5:cpu,cpuacct:/job\n4:hugetlb,memory:/job\n0::/job\n")
    machine.write("cgroup/memory/job/memory.limit_in_bytes", "5000\n")
    machine.write("cgroup/memory/job/memory.usage_in_bytes", "1500\n")
    machine.write("cgroup/cpu/job/memory.limit_in_bytes", "1\n")
    machine.write("cgroup/cpu/job/memory.usage_in_bytes", "1\n")
    assert available_memory() == 3500
    # Version 2 beside it, as systemd's hybrid layout has it.
    machine.limit("unified/job/", "4000", "1500")
    assert available_memory() == 2500


def test_this_machine_has_some() -> None:
    available = available_memory()
    assert available is not None
    assert 0 < available < 1 << 50
