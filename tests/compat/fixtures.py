"""Where the fixtures are, and how they are unpacked. Imports neither torch nor lastgood."""

import json
import lzma
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CHECKPOINTS, EXPECTED, PACKED = "checkpoints", "expected", ".xz"


def directory_of_version(version: int) -> Path:
    """The fixtures of one version of the format."""
    return HERE / f"version-{version}"


@dataclass(frozen=True)
class Fixture:
    """A checkpoint of an earlier day: a file or a directory, and what has to be read from it by each rank."""

    name: str
    path: Path
    expected: list[Any]

    @property
    def is_file(self) -> bool:
        """Whether it is a file of ``lastgood.save``, and no directory."""
        return self.path.suffix == ".pt"

    @property
    def manifest(self) -> Any:
        """What its ranks committed together, if they did."""
        path = self.path / "manifest.json"
        return json.loads(path.read_bytes())["manifest"] if path.exists() else None

    @property
    def is_spread(self) -> bool:
        """Whether it holds tensors that are spread over ranks: these come back whole, in memory of their own."""
        return self.manifest is not None and bool(self.manifest["tensors"])


def names_of(version: int) -> list[str]:
    """The checkpoints among the fixtures."""
    expected = directory_of_version(version) / EXPECTED
    found = [path.relative_to(expected).with_suffix("") for path in expected.rglob("*.json")]
    return sorted(str(name) for name in found if str(name) != "run")


def unpack(version: int, target: Path) -> dict[str, Fixture]:
    """Copies of all checkpoints of a version, by name."""
    source = directory_of_version(version)
    shutil.copytree(source / CHECKPOINTS, target)
    for packed in list(target.rglob(f"*{PACKED}")):
        packed.with_suffix("").write_bytes(lzma.decompress(packed.read_bytes()))
        packed.unlink()
    return {name: _fixture(source, target, name) for name in names_of(version)}


def _fixture(source: Path, target: Path, name: str) -> Fixture:
    file = target / f"{name}.pt"
    path = file if file.exists() else target / name
    return Fixture(name, path, json.loads((source / EXPECTED / f"{name}.json").read_text()))
