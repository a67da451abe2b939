"""What runs in checkpoint processes: torch is not imported here, as they do without."""

from multiprocessing.connection import Connection

from lastgood.storage.file_ops import OsFileOps


def tell_that_it_waits(pipe: Connection) -> None:
    """Says so, once, when it does not get a lock."""
    real = OsFileOps.lock
    told: list[bool] = []

    def lock(self: OsFileOps, descriptor: int) -> bool:
        is_free = real(self, descriptor)
        if not is_free and not told:
            told.append(True)
            pipe.send("waits")
        return is_free

    OsFileOps.lock = lock  # type: ignore[method-assign]
