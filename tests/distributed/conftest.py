"""What tests with several ranks share."""

from collections.abc import Iterator

import pytest
from tests.distributed.matrix_pool import Pool


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """Processes that become ranks of one group after another."""
    pool = Pool(tmp_path_factory.mktemp("rendezvous"))
    yield pool
    pool.kill()
