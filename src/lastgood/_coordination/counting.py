"""Rank 0 counts the votes of a save: the manifest follows from them."""

import contextlib
from collections.abc import Iterable

from lastgood._coordination.exchange import Exchange
from lastgood._coordination.tables import forget_tables, table_key
from lastgood.errors import BarrierTimeoutError
from lastgood.format.manifest import Manifest
from lastgood.format.vote import tables_of, tally

_VOTES_AT_ONCE = 512


def count_votes(exchange: Exchange, world_size: int, save_id: str, tables: set[str]) -> Manifest:
    """The manifest that follows from the votes; all ranks have cast theirs.

    ``tables`` are those of the save before; in their place come those of this save. What is not among these the store
    loses: nobody votes in another save before this one's manifest is there.
    """
    votes = _collect_votes(exchange, world_size)
    manifest = tally(votes, lambda digest: _fetch_table(exchange, digest), save_id)
    current = tables_of(votes)
    _forget(exchange, tables - current)
    tables.clear()
    tables.update(current)
    return manifest


def _forget(exchange: Exchange, tables: Iterable[str]) -> None:
    with contextlib.suppress(BarrierTimeoutError):
        exchange.ask(lambda store: forget_tables(store, tables))


def _collect_votes(exchange: Exchange, world_size: int) -> list[bytes]:
    keys = [exchange.key("vote", rank) for rank in range(world_size)]
    votes: list[bytes] = []
    for first in range(0, world_size, _VOTES_AT_ONCE):
        votes += _get_several(exchange, keys[first : first + _VOTES_AT_ONCE])
    return votes


def _get_several(exchange: Exchange, keys: list[str]) -> list[bytes]:
    values: list[bytes] = exchange.ask(lambda store: store.multi_get(keys))
    return values


def _fetch_table(exchange: Exchange, digest: str) -> bytes:
    table: bytes = exchange.ask(lambda store: store.get(table_key(digest)))
    return table
