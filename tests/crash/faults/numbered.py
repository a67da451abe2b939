"""For processes whose system calls are told apart from outside, by the files' names. Does without torch."""

import threading
from collections import Counter

from lastgood.storage import _durable_write
from lastgood.storage.file_ops import FileOps


def number_names() -> None:
    """Let temporaries have the names 1, 2, 3 in each directory, and not random ones."""
    made: Counter[str] = Counter()
    lock = threading.Lock()
    real_create, real_secrets = _durable_write._create_temporary, _durable_write.secrets
    here = threading.local()

    class Numbers:
        @staticmethod
        def token_hex(size: int) -> str:
            with lock:
                made[here.directory] += 1
                return f"{made[here.directory]:016x}"

    def create(ops: FileOps, directory: str, name: str) -> tuple[str, int]:
        here.directory = directory
        return real_create(ops, directory, name)

    assert hasattr(real_secrets, "token_hex")
    _durable_write.secrets = Numbers  # type: ignore[assignment]
    _durable_write._create_temporary = create
