"""For people who write storage backends: what a backend is tested with, power cuts and failing system calls among it.

:mod:`lastgood.testing.storage_backend_tests` needs pytest; nothing else here imports it.
"""

from lastgood.testing.crash_file_ops import CrashFileOps
from lastgood.testing.fault_file_ops import FaultFileOps

__all__ = ["CrashFileOps", "FaultFileOps"]
