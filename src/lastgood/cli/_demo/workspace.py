"""The directory in which the demo works, and where it leaves its picture."""

import shutil
from pathlib import Path

from lastgood.errors import ConfigError

_MARK = "made-by-lastgood-demo"


class Workspace:
    """An empty place for a demo run. Only a directory that an earlier demo made is ever emptied."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.reference = directory / "reference"
        self.checkpoints = directory / "checkpoints"
        self.log = directory / "training.log"
        self.picture = directory / "loss.svg"
        if directory.exists() and not directory.is_dir():
            raise ConfigError(f"--out {directory} is a file; name a directory, new or empty", path=str(directory))
        if directory.is_dir() and any(directory.iterdir()) and not (directory / _MARK).exists():
            raise ConfigError(
                f"--out {directory} holds files that the demo did not make, and it would not delete them: "
                "name a directory that is new or empty",
                path=str(directory),
            )
        directory.mkdir(parents=True, exist_ok=True)
        (directory / _MARK).touch()
        self.remove_checkpoints()
        self.log.unlink(missing_ok=True)
        self.picture.unlink(missing_ok=True)

    def remove_checkpoints(self) -> None:
        """Give the disk space back; the picture and the log stay."""
        for directory in (self.reference, self.checkpoints):
            if directory.exists():
                shutil.rmtree(directory)
