"""What lastgood's promises rest on, one step at a time."""

from tests.mutations.checksums import CHECKSUMS
from tests.mutations.exclusive import EXCLUSIVE
from tests.mutations.fsyncs import FSYNCS
from tests.mutations.ids import IDS
from tests.mutations.mutation import Mutation
from tests.mutations.order import ORDER

MUTATIONS: dict[str, tuple[Mutation, ...]] = {
    "fsyncs": FSYNCS,
    "checksums": CHECKSUMS,
    "ids": IDS,
    "order": ORDER,
    "exclusive": EXCLUSIVE,
}
