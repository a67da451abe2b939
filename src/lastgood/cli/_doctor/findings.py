"""From facts to what they mean: pure functions, one for each kind of thing that can be wrong with a run's directory."""

import os
import shlex
from collections.abc import Iterator

import msgspec

from lastgood.cli._disk import WriterTrace
from lastgood.cli._doctor.facts import Facts
from lastgood.cli._output import human_bytes, human_moment, human_time
from lastgood.format.epoch import epoch_file
from lastgood.manager.catalog import RUN_LOG_NAME, Condition, Entry, step_name
from lastgood.manager.run_log import RunRecord, SaveRecord, SetAsideRecord

_CLOCKS_AGREE_SECS = 60
_ROOM_FOR = 2
_FAILURES_SHOWN = 3


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is not as it should be (or, without ``needs_action``, that is worth knowing).

    ``what`` is there, what that ``means``, what is ``safe``, and what to ``do``, with the ``command`` that does it or
    looks closer.
    """

    kind: str
    path: str
    what: str
    means: str
    safe: str
    do: str
    command: str | None = None
    step: int | None = None
    needs_action: bool = True


def diagnose(facts: Facts) -> list[Finding]:
    """All findings: first what concerns the run as a whole, then step by step, then what lies about."""
    findings = [*_nothing_committed(facts), *_space(facts), *_log(facts), *_epoch(facts)]
    for entry in facts.catalog.entries:
        findings += _of_step(facts, entry)
    findings += [_set_aside(facts, name, size) for name, size in facts.set_aside.items()]
    findings += [_plain_file(facts, name) for name in facts.plain_files]
    findings += [_trace(trace, None) for trace in facts.traces.get(None, ())]
    return findings


def _command(*words: str) -> str:
    return shlex.join(words)


def _resume(facts: Facts) -> str:
    """Where a run would go on, in spite of what was found at another step."""
    newest = max((entry.step for entry in facts.catalog.committed), default=-1)
    first = [entry.step for entry in facts.catalog.entries if entry.condition is Condition.FOREIGN]
    tries = f"A run that resumes tries step {max(first)} first" if first and max(first) > newest else ""
    if newest < 0:
        return f"{tries}." if tries else "There is no committed checkpoint to go on from."
    return f"{tries}, then step {newest}." if tries else f"A run that resumes goes on from step {newest}."


def _nothing_committed(facts: Facts) -> Iterator[Finding]:
    if facts.catalog.committed:
        return
    something = bool(facts.catalog.entries or facts.set_aside)
    refused = any(entry.condition is not Condition.UNFINISHED for entry in facts.catalog.entries)
    yield Finding(
        kind="no committed checkpoint",
        path=facts.root,
        what="No checkpoint here is committed." if something else "There is no checkpoint here.",
        means="If none of them can be loaded, a run that resumes here stops with an error, and does not begin anew."
        if refused
        else "A run that starts here begins from nothing.",
        safe="Nothing is lost by looking: do not delete anything before you know why.",
        do="Read on below, and make sure that this is the directory that the run was given."
        if something
        else "Nothing, if the run has not saved yet. Otherwise make sure that it was given this directory.",
        command=_command("lastgood", "ls", "--all", facts.root) if something else None,
        needs_action=something,
    )


def _space(facts: Facts) -> Iterator[Finding]:
    if not facts.catalog.committed or facts.available is None:
        return
    newest = facts.catalog.committed[-1]
    if not newest.nbytes or facts.available >= _ROOM_FOR * newest.nbytes:
        return
    room = "for one more" if facts.available >= newest.nbytes else "not even for one more"
    yield Finding(
        kind="little space",
        path=facts.root,
        what=f"{human_bytes(facts.available)} are left on the file system; the newest checkpoint takes "
        f"{human_bytes(newest.nbytes)}: that is room {room}.",
        means="A save that does not fit fails before it writes anything; training goes on without a newer checkpoint.",
        safe="What is committed stays as it is: a full disk damages none of it.",
        do="Free some space, or see which checkpoints can go.",
        command=_command("lastgood", "prune", facts.root, "--keep", "last=3"),
    )


def _log(facts: Facts) -> Iterator[Finding]:
    path = os.path.join(facts.root, RUN_LOG_NAME)
    if facts.log_problem is not None:
        yield Finding(
            kind="unreadable log",
            path=path,
            what=f"The run's log cannot be read: {facts.log_problem}",
            means="What became of each save cannot be told; 'prune' does not know the run's rules.",
            safe="Checkpoints do not depend on the log.",
            do="Look at its owner and mode, and at the device.",
            command=_command("ls", "-ld", path),
        )
    starts = [number for number, record in enumerate(facts.log) if isinstance(record, RunRecord)]
    latest_run = facts.log[starts[-1] if starts else 0 :]
    saves = [record for record in latest_run if isinstance(record, SaveRecord)]
    failures = [save for save in saves if save.outcome == "failed"]
    if not failures:
        return
    is_over = saves[-1].outcome == "durable"
    listed = "; ".join(
        f"step {save.step} at {human_moment(save.time)}: {save.error or 'no reason was noted'}"
        for save in failures[-_FAILURES_SHOWN:]
    )
    yield Finding(
        kind="failed saves",
        path=path,
        what=f"{len(failures)} of the {len(saves)} saves of the latest run failed. The last: {listed}",
        means=f"A later one, of step {saves[-1].step}, succeeded."
        if is_over
        else "The latest save failed: progress since the last durable one would be lost if the run died now.",
        safe="A failed save leaves earlier checkpoints untouched.",
        do="Nothing, unless it goes on." if is_over else "Do what the error says; the next save tries again.",
        command=None if is_over else _command("tail", "-n", "5", path),
        needs_action=not is_over,
    )


def _epoch(facts: Facts) -> Iterator[Finding]:
    if facts.epoch_problem is not None:
        path = epoch_file(facts.root)
        yield Finding(
            kind="unreadable epoch",
            path=path,
            what=f"The record of which job of several ranks saves here cannot be read: {facts.epoch_problem}",
            means="No job of several ranks can begin to save here.",
            safe=f"It is no part of any checkpoint. {_resume(facts)}",
            do="Make sure that no job saves here, and remove it: the next one makes a new one.",
            command=_command("rm", path),
        )


def _of_step(facts: Facts, entry: Entry) -> Iterator[Finding]:
    traces = facts.traces.get(entry.step, ())
    match entry.condition:
        case Condition.UNFINISHED:
            yield _unfinished(facts, entry, traces)
            return
        case Condition.DAMAGED:
            yield _damaged(facts, entry)
        case Condition.FOREIGN:
            yield _foreign(entry)
        case Condition.UNREADABLE:
            yield _unreadable(facts, entry)
        case Condition.MISPLACED:
            yield from _renamed(facts, entry)
        case Condition.COMMITTED:
            yield from _clock(facts, entry)
    for trace in traces:
        yield _trace(trace, entry)


def _unfinished(facts: Facts, entry: Entry, traces: tuple[WriterTrace, ...]) -> Finding:
    problem = entry.problem or "it is not committed"
    if any(trace.is_held is not False for trace in traces):
        known = any(trace.is_held for trace in traces)
        return Finding(
            kind="being written" if known else "perhaps being written",
            path=entry.path,
            step=entry.step,
            what=f"Step {entry.step} is being written at this moment, by a process that is alive."
            if known
            else f"Step {entry.step} is not committed, and whether anybody is writing it cannot be told.",
            means="It counts as a checkpoint once it is committed.",
            safe=_resume(facts),
            do="Nothing. Leave the directory alone." if known else "Find out which jobs use this directory.",
            needs_action=False,
        )
    parts = entry.world_size is not None and entry.world_size > 1
    do, command = _clearing(facts, entry)
    return Finding(
        kind="rank files without a manifest" if parts else "unfinished save",
        path=entry.path,
        step=entry.step,
        what=f"Step {entry.step} is not committed: {problem}. No process that this machine knows of is writing there.",
        means="The last act of a save, which makes it count, never came: a kill, a failure, a missing rank. (Or a job "
        "on another machine is writing it, and its locks do not reach this one.)",
        safe=f"No run resumes from it. {_resume(facts)}",
        do=do,
        command=command,
    )


def _clearing(facts: Facts, entry: Entry) -> tuple[str, str]:
    """What to do about an unfinished save that nobody is writing, and the command."""
    strangers = facts.strangers.get(entry.step, ())
    if strangers:
        return (
            f"See what else is in it ({', '.join(strangers[:3])}): because of that, 'prune' leaves it alone.",
            _command("ls", "-la", entry.path),
        )
    if facts.catalog.committed and facts.catalog.committed[-1].step > entry.step:
        return (
            "Clear it away; this command removes no checkpoint that is committed.",
            _command("lastgood", "prune", facts.root, "--keep", "every=1", "--yes"),
        )
    return (
        "Nothing, if the run goes on: it saves this step anew. If it does not, remove the directory.",
        _command("rm", "-r", entry.path),
    )


def _damaged(facts: Facts, entry: Entry) -> Finding:
    return Finding(
        kind="damaged",
        path=entry.path,
        step=entry.step,
        what=f"Step {entry.step} is damaged: {entry.problem}",
        means="Its bytes are not those that were written. A resume passes over it and sets it aside.",
        safe=_resume(facts),
        do="Find out what is damaged, and look at the device; restore the files from another copy if you have one.",
        command=_command("lastgood", "verify", entry.path),
    )


def _foreign(entry: Entry) -> Finding:
    return Finding(
        kind="foreign",
        path=entry.path,
        step=entry.step,
        what=f"Step {entry.step} does not count as lastgood's: {entry.problem}.",
        means="What torch.save wrote still loads, and a resume tries it; but nothing can tell whether its bytes are "
        "the right ones. A file of lastgood's that was cut off looks like this too, and does not load.",
        safe="'prune' never removes it, and removes nothing because of it.",
        do="See what it is.",
        command=_command("lastgood", "inspect", entry.path),
    )


def _unreadable(facts: Facts, entry: Entry) -> Finding:
    return Finding(
        kind="unreadable",
        path=entry.path,
        step=entry.step,
        what=f"Step {entry.step} cannot be read: {entry.problem}",
        means="Whether it is a good checkpoint cannot be told until it can be read.",
        safe=f"Nothing was changed. {_resume(facts)}",
        do="Look at owner and mode; after an I/O error, at the kernel's log. Do not delete it: it may be whole.",
        command=_command("ls", "-la", entry.path),
    )


def _clock(facts: Facts, entry: Entry) -> Iterator[Finding]:
    if entry.saved_at is None or entry.saved_at <= facts.now + _CLOCKS_AGREE_SECS:
        return
    yield Finding(
        kind="saved in the future",
        path=entry.path,
        step=entry.step,
        what=f"Step {entry.step} notes that it was saved at {human_moment(entry.saved_at)}, "
        f"{human_time(entry.saved_at - facts.now)} from now.",
        means="The clock of the machine that saved it was ahead, or this machine's is behind. Rules that keep one "
        "checkpoint per time span may keep another one than you expect.",
        safe="A resume goes by steps, not by clocks.",
        do="Compare the machines' clocks.",
        command="date",
    )


def _renamed(facts: Facts, entry: Entry) -> Iterator[Finding]:
    noted = facts.noted_steps.get(entry.step, entry.step)
    if noted == entry.step:
        return
    holder = facts.catalog.entry(noted)
    if holder is None:
        do = "If nobody meant this, give it back its name."
        command = _command("mv", "-n", entry.path, os.path.join(facts.root, step_name(noted)))
    else:
        do = f"Find out which of the two is the right one; step {noted} is {holder.condition.value}."
        command = _command("lastgood", "diff", holder.path, entry.path)
    yield Finding(
        kind="renamed",
        path=entry.path,
        step=entry.step,
        what=f"The directory of step {entry.step} holds a checkpoint that was saved as step {noted}.",
        means="Somebody renamed or copied it. It does not count: a run that resumes passes it over.",
        safe="Its bytes are not affected by its name.",
        do=do,
        command=command,
    )


def _trace(trace: WriterTrace, entry: Entry | None) -> Finding:
    name = "lock" if trace.is_lock else "temporary file"
    if trace.is_held is not False:
        known = trace.is_held is True
        return Finding(
            kind="being written" if known else "perhaps being written",
            path=trace.path,
            step=entry.step if entry else None,
            what=f"A process that is alive holds this {name}."
            if known
            else f"There is a {name} of a writer, and whether it is alive cannot be told.",
            means="Somebody is writing the file of that name anew." if known else "It may be at work.",
            safe="Until it is done, the file that has the name now stays.",
            do="Nothing. Leave it alone.",
            needs_action=False,
        )
    return Finding(
        kind=f"stray {name}",
        path=trace.path,
        step=entry.step if entry else None,
        what=f"A writer that has died left its {name} behind.",
        means="It takes room and nothing else: no reader looks at it.",
        safe="Nothing in it counts. The next save of the same name removes it by itself.",
        do="Remove it, if there will be no such save.",
        command=_command("rm", trace.path),
    )


def _set_aside(facts: Facts, name: str, size: int) -> Finding:
    path = os.path.join(facts.root, name)
    known = [record for record in facts.log if isinstance(record, SetAsideRecord) and record.name == name]
    why = f" The log says: {known[-1].problem}" if known else ""
    return Finding(
        kind="set aside",
        path=path,
        step=known[-1].step if known else None,
        what=f"A resume found this checkpoint damaged and set it aside; it takes {human_bytes(size)}.{why}",
        means="It was the newest once, and was passed over: the run went on from an earlier step.",
        safe=f"Nothing removes it by itself, and no run resumes from it. {_resume(facts)}",
        do="Find out what is damaged, and look at the device. When nobody needs it any more, remove the directory.",
        command=_command("lastgood", "verify", path),
    )


def _plain_file(facts: Facts, name: str) -> Finding:
    return Finding(
        kind="not a directory",
        path=os.path.join(facts.root, name),
        what=f"{name} is a file; checkpoints of this name are directories.",
        means="Somebody put it there. A save of that step would fail.",
        safe="lastgood never removes it.",
        do="Move it elsewhere, if the run may come to that step.",
        command=_command("mv", "-n", os.path.join(facts.root, name), os.path.join(facts.root, f"{name}.file")),
    )
