"""The README's examples are what users copy: each runs as it stands."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[2] / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 2


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_runs(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    given = {"model": model, "optimizer": optimizer, "step": 7, "train_one_step": lambda: None}
    exec(compile(example, str(README), "exec"), given)
    assert any(tmp_path.iterdir())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
