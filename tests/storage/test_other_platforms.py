"""Without anything that only Linux has, storage imports and works through the page cache."""

import os
import subprocess
import sys
from pathlib import Path

# A process of its own: it takes away from the interpreter what another platform would not have.
_WITHOUT_LINUX = """
import mmap, os, sys
sys.platform = "plan9"
for module, name in ((os, "O_DIRECT"), (os, "preadv"), (os, "O_CLOEXEC"), (os, "O_DIRECTORY"), (mmap, "MADV_HUGEPAGE"),
                     (mmap, "MAP_PRIVATE")):
    delattr(module, name)
from lastgood.errors import CheckpointExistsError, StorageError
from lastgood.storage._direct_io import aligned_buffer
from lastgood.storage.local import LocalStorage
from lastgood.testing.storage_backend_tests import random_bytes, read_all

storage, path = LocalStorage(), sys.argv[1] + "/run/file"
data = random_bytes((3 << 20) + 5)
buffer = aligned_buffer(len(data))
buffer[:] = data
write = storage.begin(path, len(data))
write.write_at(0, buffer)
write.commit()
assert read_all(storage, path) == data
try:
    storage.put_if_absent(path, b"other")
except CheckpointExistsError:
    print("kept")
storage.put(path, b"replaced")
assert read_all(storage, path) == b"replaced"
assert "torch" not in sys.modules
print("done")
"""


def test_what_only_linux_has_is_done_without(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-W", "error", "-c", _WITHOUT_LINUX, str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-2:] == ["kept", "done"]
    assert os.listdir(tmp_path / "run") == ["file"]
