"""For people who write storage backends: what a backend is tested with.

:mod:`lastgood.testing.storage_backend_tests` needs pytest; nothing else here imports it.
"""

from lastgood.testing.crash_file_ops import CrashFileOps

__all__ = ["CrashFileOps"]
