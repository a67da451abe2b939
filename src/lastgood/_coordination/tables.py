"""What ranks say alike when they vote: tables in the store, each under the digest of its bytes, passed on once."""

from collections.abc import Iterable, Mapping
from typing import Any


def send_tables(store: Any, rank: int, tables: Mapping[str, bytes]) -> None:
    """Bring tables to the store. Of all ranks that have the same one, the rank that came first sends it."""
    for digest, table in tables.items():
        sender = store.compare_set(table_key(digest, "sender"), "", str(rank))
        if sender == str(rank).encode() and not store.check([table_key(digest)]):
            store.set(table_key(digest), table)


def forget_tables(store: Any, digests: Iterable[str]) -> None:
    """Remove tables that no vote refers to any more."""
    for digest in digests:
        store.delete_key(table_key(digest))
        store.delete_key(table_key(digest, "sender"))


def table_key(digest: str, *what: str) -> str:
    """Where a table stands in the store, or what belongs to it."""
    return "/".join(("tables", digest, *what))
