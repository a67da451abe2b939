"""The text of the demo is the same whenever it is read, and a position in it is enough to go on."""

import shutil
from pathlib import Path

import pytest

from lastgood.cli._demo.corpus import read_corpus, standard_library
from lastgood.errors import LastgoodError


def test_the_corpus_is_source_code_of_the_standard_library() -> None:
    corpus = read_corpus()
    assert (standard_library() / "argparse.py").read_bytes() in corpus
    assert 2 * 1024 * 1024 <= len(corpus) < 4 * 1024 * 1024


def test_the_corpus_does_not_depend_on_the_order_in_which_files_are_listed(tmp_path: Path) -> None:
    names = ["c.py", "a.py", "b.py", "data.txt"]
    for directory, order in (("one", names), ("other", names[::-1])):
        (tmp_path / directory).mkdir()
        for name in order:
            (tmp_path / directory / name).write_text(f"# {name}\n")
    assert read_corpus(tmp_path / "one") == read_corpus(tmp_path / "other") == b"# a.py\n# b.py\n# c.py\n"


def test_a_library_without_source_is_a_clear_error(tmp_path: Path) -> None:
    shutil.copytree(standard_library() / "json" / "__pycache__", tmp_path / "lib", dirs_exist_ok=True)
    with pytest.raises(LastgoodError, match=r"there is none in .*lib") as caught:
        read_corpus(tmp_path / "lib")
    assert caught.value.path == str(tmp_path / "lib")


def test_batches_go_on_from_a_position_as_if_they_had_never_stopped() -> None:
    import torch

    from lastgood.cli._demo.batches import Batches

    text = bytes(range(256)) * 3
    unbroken = Batches(text, size=4, length=16, seed=5)
    stopped = Batches(text, size=4, length=16, seed=5)
    # 47 windows make 11 batches a pass: 30 batches cross two passes, each with an order of its own.
    expected = [unbroken.next_batch() for _ in range(30)]
    got = [stopped.next_batch() for _ in range(13)]
    resumed = Batches(text, size=4, length=16, seed=5)
    resumed.load_state_dict(stopped.state_dict())
    got += [resumed.next_batch() for _ in range(17)]
    for one, other in zip(expected, got, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
    assert not torch.equal(expected[0][0], expected[11][0])
    inputs, targets = expected[0]
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_a_text_too_short_for_one_batch_is_refused() -> None:
    from lastgood.cli._demo.batches import Batches

    with pytest.raises(ValueError, match="10 bytes does not fill one batch"):
        Batches(b"0123456789", size=4, length=16, seed=5)
