"""Models in several GGUF files.  pytest tests/coordinator/models/test_parts.py"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from warmfront.coordinator.models.open import open_source
from warmfront.coordinator.packing.content import content_of, state_of
from warmfront.shared.errors import ModelError

Make = Callable[..., Path]


@pytest.fixture
def split(tiny_gguf: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The parts of a model, as the gguf package splits it; all of it is in plain.gguf too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    tiny_gguf("plain.gguf")
    tiny_gguf("model.gguf", tensors_a_file=4)
    return sorted(tmp_path.glob("model-0000?-of-00003.gguf"))


def test_a_model_in_several_files(tiny_gguf: Make, tmp_path: Path, split: list[Path]) -> None:
    """Whichever part is given."""
    whole = open_source(tmp_path / "plain.gguf")
    assert len(split) == 3
    for part in split:
        source = open_source(part)
        assert source.names() == whole.names()
        for name in whole.names():
            np.testing.assert_array_equal(source.tensor(name).float32(), whole.tensor(name).float32())
    assert set(state_of(split[1])) == {"", split[0].name, split[2].name}
    content = content_of(split[0], print)
    split[2].write_bytes(split[2].read_bytes()[:-1] + b"?")
    assert content_of(split[0], print) != content


def test_parts_that_do_not_fit_together(split: list[Path]) -> None:
    other = split[1].read_bytes()
    split[1].write_bytes(split[2].read_bytes())
    with pytest.raises(ModelError, match=r"00002-of-00003\.gguf is part 3 of 3, whatever its name says"):
        open_source(split[0])
    split[1].write_bytes(other)
    split[2].unlink()
    with pytest.raises(ModelError, match=r"00003-of-00003\.gguf: part of a model of 3 files, which is not there"):
        open_source(split[0])
    with pytest.raises(ModelError, match="of a model of 3 files, which is not there"):
        content_of(split[0], print)
