"""Did the killed run end where the run that was never killed ended? To the last bit?"""

from pathlib import Path

from lastgood import make_sync_checkpointer
from lastgood.cli._demo.figures import Comparison, Part
from lastgood.cli._demo.fingerprint import differences, fingerprint
from lastgood.cli._demo.protocol import Finished
from lastgood.cli._demo.supervisor import Life


def compare(reference: tuple[Path, list[Life]], killed: tuple[Path, list[Life]]) -> Comparison:
    """Load both final checkpoints and compare every tensor's bytes and every other value."""
    checkpointer = make_sync_checkpointer()
    states = [checkpointer.load(str(path)) for path, _ in (reference, killed)]
    checkpointer.close()
    in_memory = [_reported_fingerprint(lives) for _, lives in (reference, killed)]
    parts = (
        Part("weights", *(fingerprint(state["model"]) for state in states)),
        Part("optimizer state", *(fingerprint(state["optimizer"]) for state in states)),
        Part("everything", *(fingerprint(state) for state in states)),
    )
    return Comparison(
        parts,
        tuple(differences(*states)),
        files_hold_what_was_in_memory=in_memory == [fingerprint(state) for state in states],
    )


def _reported_fingerprint(lives: list[Life]) -> str:
    last = lives[-1].events[-1]
    return last.fingerprint if isinstance(last, Finished) else ""
