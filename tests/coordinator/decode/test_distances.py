"""How far ahead is fetched changes no bit of a logit.  pytest tests/coordinator/decode/test_distances.py"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.coordinator.decode.teams import JOBS, Workers, opened, packed, place, with_predictors
from warmfront.shared.kernels.fetching import Distances, no_fetching
from warmfront.shared.model.formats import Kind
from warmfront.shared.model.store import PackedModel
from warmfront.shared.selector import LOWRANK
from warmfront.shared.wire.handoff import DONE


def logits(model: PackedModel, cached: Kind, distances: Distances) -> bytes:
    workers, position, said = Workers(model), 0, b""
    options = {"selector": LOWRANK, "cache_kind": cached, "distances": distances}
    team = opened(model, workers, "compiled", **options)
    for tokens in JOBS:
        assert team.run(tokens, [place(position)], True, decode=len(tokens) == 1) == DONE
        position += len(tokens)
        said += team.logits.tobytes() + workers.board.mask.tobytes()
    team.stop()
    workers.end()
    return said


@pytest.mark.parametrize(("dtype", "cached"), [("f32", Kind.F32), ("f16", Kind.F16), ("q8", Kind.Q8), ("q4", Kind.F16)])
def test_logits(dtype: str, cached: Kind, tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = with_predictors(tiny_llama(hidden_act="relu", intermediate_size=200), tmp_path / "model")
    with packed(folder, dtype) as model:
        tables = [np.full_like(no_fetching(), ahead) for ahead in (0, 64, 5120, 1 << 30)]
        assert len({logits(model, cached, table) for table in tables}) == 1
