"""Whether the run can go on from what is there, in plain sentences."""

from collections import Counter

from lastgood.cli._report.data import Health
from lastgood.cli._report.words import count_in_words, moment_in_words
from lastgood.manager.catalog import Catalog, Condition, is_set_aside


def health_of(catalog: Catalog) -> Health:
    """The counts, and sentences that say what they mean."""
    counts = Counter(entry.condition for entry in catalog.entries)
    set_aside = sum(is_set_aside(name) for name in catalog.others)
    committed = catalog.committed
    latest = committed[-1] if committed else None
    return Health(
        sentences=[_first_sentence(catalog), *_further_sentences(catalog, counts, set_aside)],
        is_good=latest is not None and not counts[Condition.DAMAGED] and not counts[Condition.UNREADABLE],
        committed=len(committed),
        unfinished=counts[Condition.UNFINISHED],
        damaged=counts[Condition.DAMAGED],
        foreign=counts[Condition.FOREIGN],
        unreadable=counts[Condition.UNREADABLE],
        set_aside=set_aside,
        latest_step=latest.step if latest else None,
        latest_saved_at=latest.saved_at if latest else None,
        nbytes=sum(entry.nbytes for entry in committed),
    )


def _first_sentence(catalog: Catalog) -> str:
    committed = catalog.committed
    if not committed:
        return "No checkpoint is committed: a training that starts now begins from nothing."
    newest = committed[-1]
    when = "" if newest.saved_at is None else f", saved {moment_in_words(newest.saved_at)} UTC"
    are = "is" if len(committed) == 1 else "are"
    there = f"{count_in_words(len(committed), 'checkpoint')} {are} committed"
    return f"{there}; a training that resumes now goes on from step {newest.step}{when}."


def _further_sentences(catalog: Catalog, counts: Counter[Condition], set_aside: int) -> list[str]:
    sentences = []
    if count := counts[Condition.DAMAGED]:
        which = ", ".join(str(entry.step) for entry in catalog.entries if entry.condition is Condition.DAMAGED)
        sentences.append(f"{count_in_words(count, 'checkpoint')} cannot be what was written: step {which}.")
    if count := counts[Condition.UNREADABLE]:
        sentences.append(f"{count_in_words(count, 'checkpoint')} cannot be read at all.")
    if count := counts[Condition.UNFINISHED]:
        sentences.append(
            f"{count_in_words(count, 'save')} never came to an end, or {'is' if count == 1 else 'are'} still under way."
        )
    if count := counts[Condition.FOREIGN]:
        sentences.append(f"{count_in_words(count, 'checkpoint')} lastgood did not write.")
    if count := counts[Condition.MISPLACED]:
        sentences.append(f"{count_in_words(count, 'checkpoint')} {'is' if count == 1 else 'are'} of another step.")
    if set_aside:
        are = "was" if set_aside == 1 else "were"
        sentences.append(f"{count_in_words(set_aside, 'damaged checkpoint')} {are} set aside by a resume.")
    return sentences
