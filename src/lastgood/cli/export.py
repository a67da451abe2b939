"""``lastgood export``: a checkpoint as one plain file, with whole tensors, that ``torch.load`` reads."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lastgood._contents import Contents, FileContents, open_contents
from lastgood._contents.joint import has_parts
from lastgood.cli._keys import Way, ways
from lastgood.cli._output import AsJson, Output, human_bytes
from lastgood.cli._target import CheckpointPath, Step, find_checkpoint
from lastgood.errors import CheckpointExistsError, ConfigError, RankMismatchError, UncommittedCheckpointError, listed
from lastgood.format.nodes import CONTAINERS, Node, ShardedNode, walk_paths
from lastgood.manager.progress import shown_progress

if TYPE_CHECKING:
    from lastgood._loading.per_rank import PerRankRule


@dataclass(frozen=True)
class Exported:
    """What was written. ``left_out`` are the keys that are not in it."""

    path: str
    output: str
    nbytes: int
    world_size: int
    left_out: list[str]


def export(
    path: CheckpointPath,
    out: Annotated[str, typer.Argument(metavar="OUT", help="The file to write, such as model.pt.")],
    step: Step = None,
    per_rank: Annotated[
        list[str] | None,
        typer.Option(
            "--per-rank",
            metavar="KEY=RULE",
            help="For values that ranks do not have alike: 'first' takes that of rank 0, a number that of this rank, "
            "'all' makes a list of them, 'leave' leaves them out. KEY covers all that is below it, and may be a "
            "pattern such as 'rng*'. May be given several times; the first that fits counts.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint as one plain file: whole tensors, whatever number of ranks saved it, and in whatever layout.

    torch.load(OUT, weights_only=True) reads it, without lastgood; tensors are on the CPU. All that is read is compared
    with its checksums. OUT appears whole and durable, or not at all. The whole state has to fit into memory once.

    \b
    Example:
      lastgood export runs/gpt model.pt
      lastgood export runs/gpt/step-1000 model.pt --per-rank rng=leave --per-rank loader=first
    """
    output = Output(as_json)
    found, note = find_checkpoint(path, step)
    contents = open_contents(found)
    _refuse_out(out, contents, overwrite=overwrite)
    _require_one_state(contents)
    rules = _parse(per_rank or [], contents)
    with shown_progress(f"reading {found}"):
        state, left_out = _load(contents, rules)
    with shown_progress(f"writing {out}"):
        _write(state, out, contents.files[0], overwrite=overwrite)
    if note:
        output.print(f"note: {note}", style="yellow")
    result = Exported(found, out, os.path.getsize(out), contents.files[0].world_size, left_out)
    if left_out:
        output.print(f"left out: {listed(left_out)}", style="yellow")
    output.print(f"{out}: {human_bytes(result.nbytes)}, all that {found} holds" + (", but that" if left_out else ""))
    output.json(result)


def _refuse_out(out: str, contents: Contents, *, overwrite: bool) -> None:
    if os.path.isdir(out):
        raise ConfigError(f"{out} is a directory: name the file to write.", path=out)
    if any(os.path.exists(out) and os.path.samefile(out, file.path) for file in contents.files):
        raise ConfigError(f"{out} belongs to the checkpoint itself: write to another file.", path=out)
    if os.path.exists(out) and not overwrite:
        raise _there_already(out)


def _there_already(out: str) -> ConfigError:
    return ConfigError(f"{out} is there already, and was left as it is: --overwrite replaces it.", path=out)


def _require_one_state(contents: Contents) -> None:
    """Refuse files that are no state by themselves."""
    path, first = contents.path, contents.files[0]
    if contents.manifest is not None or first.world_size == 1:
        if len(contents.files) > 1 and contents.manifest is None:
            raise ConfigError(f"{path} holds {len(contents.files)} files that belong to no save: name one.", path=path)
        return
    if os.path.isdir(path) and not first.independent:
        raise UncommittedCheckpointError(
            f"{path} was written by {first.world_size} ranks and never committed; export an earlier step.", path=path
        )
    if os.path.isdir(path):
        raise ConfigError(
            f"{first.world_size} ranks saved to {path}, each for itself: name one file, such as {first.path}.",
            path=path,
        )
    if has_parts(first):
        raise ConfigError(
            f"{path} is the file of rank {first.rank} of {first.world_size}, with only parts of tensors: name the "
            "checkpoint's directory.",
            path=path,
        )


def _parse(words: Sequence[str], contents: Contents) -> "dict[str, PerRankRule]":
    """The rules that were given, as the loader takes them."""
    keys = {key for file in contents.files for key, _ in walk_paths(file.root)} if words else set()
    rules: dict[str, PerRankRule] = {}
    for word in words:
        pattern, separator, rule = word.rpartition("=")
        if not separator or not pattern:
            raise ConfigError(f"--per-rank {word!r} is not of the form KEY=RULE, such as rng=first.")
        if not any(fnmatchcase(key, pattern) for key in keys):
            raise ConfigError(f"--per-rank {word!r}: no key of {contents.path} is {pattern}.", path=contents.path)
        rules.setdefault(pattern, _rule(word, rule, contents.files[0].world_size))
    return rules


def _rule(word: str, rule: str, world_size: int) -> "PerRankRule":
    if rule == "first":
        return "first"
    if rule == "leave":
        return "leave"
    if rule == "all":
        return lambda values, rank_info: values
    if rule.isdecimal() and int(rule) < world_size:
        rank = int(rule)
        return lambda values, rank_info: values[rank]
    raise ConfigError(
        f"--per-rank {word!r}: {rule!r} is neither 'first', 'all' nor 'leave', nor one of the ranks 0 to "
        f"{world_size - 1}."
    )


def _load(contents: Contents, rules: "Mapping[str, PerRankRule]") -> tuple[Any, list[str]]:
    """The whole state, and the keys that are not in it."""
    import lastgood
    from lastgood.cli._tensors import quiet_torch

    path = contents.path
    with quiet_torch():
        if contents.manifest is None or contents.manifest.world_size == 1:
            return lastgood.load(contents.files[0].path, map_location="cpu"), []
        from lastgood._loading.per_rank import find_rule
        from lastgood.cli._whole import WholeSource

        with WholeSource(path) as source:
            undecided = [key for key in sorted(source.own) if find_rule(rules, key) is None]
            if undecided:
                raise _no_rule(path, undecided, source.world_size)
            try:
                state = source.load(None, rules)
            except RankMismatchError as error:
                raise _no_rule(path, [error.tensor or "some keys"], source.world_size) from error
            return state, [key for key, node, way in ways(source.root) if _is_leaf(node) and not _is_in(state, way)]


def _is_leaf(node: Node) -> bool:
    return isinstance(node, ShardedNode) or not isinstance(node, CONTAINERS)


def _is_in(state: Any, way: Way) -> bool:
    try:
        way.follow(state)
    except (LookupError, TypeError):
        return False
    return True


def _no_rule(path: str, keys: list[str], world_size: int) -> RankMismatchError:
    top = keys[0].partition(".")[0].partition("[")[0]
    return RankMismatchError(
        f"{path} was saved by {world_size} ranks, which do not all have the same under {listed(keys)}: say which to "
        f"take. --per-rank {top}=first takes that of rank 0, {top}=leave none; 'lastgood export --help' has more. "
        "Nothing was written.",
        path=path,
        tensor=keys[0],
    )


def _write(state: Any, out: str, about: FileContents, *, overwrite: bool) -> None:
    """Write the file as ``lastgood.save`` does, with what the checkpoint notes of itself."""
    from lastgood._image_writer import new_save_id, write_durably
    from lastgood._loading.records import NO_PROGRESS_TIMEOUT_SECS
    from lastgood.capture import capture
    from lastgood.cli._tensors import quiet_torch
    from lastgood.format.index_head import IndexHead
    from lastgood.storage.local import LocalStorage

    head = IndexHead(
        save_id=new_save_id(),
        rank=0,
        world_size=1,
        step=about.step,
        independent=False,
        saved_at=about.saved_at,
        metrics=about.metrics,
    )
    with quiet_torch():
        image = capture(state).image(head)
    upload = write_durably(image, LocalStorage(), out, rank=None, no_progress_timeout_secs=NO_PROGRESS_TIMEOUT_SECS)
    try:
        upload.commit(replace=overwrite)
    except CheckpointExistsError as error:
        raise _there_already(out) from error
    finally:
        upload.abort()
