"""The table of weight types as kernels read them.  pytest tests/shared/kernels/test_row_formats.py"""

import pytest

from warmfront.shared.kernels.row_formats import FORMATS, PLAIN, TILED
from warmfront.shared.kernels.rows import row_stride, takes_quantised
from warmfront.shared.model.formats import FLOATS, Kind, row_bytes


def test_every_type_has_its_record() -> None:
    assert [form.kind for form in FORMATS] == list(Kind)
    assert {form.kind for form in FORMATS} - {form.kind for form in PLAIN} == {Kind.Q4C}


@pytest.mark.parametrize("kind", Kind)
def test_rows_are_as_long_as_they_are_packed(kind: Kind) -> None:
    for cols in (32, 96, 576, 4096):
        assert row_stride(kind, cols) == row_bytes(kind, cols)


def test_which_types_take_their_input_quantised() -> None:
    """Those that hold whole numbers and their own scales; among them all that can be in tiles."""
    assert {form.kind for form in TILED} == {Kind.Q8, Kind.Q4, Kind.Q4S}
    assert all(takes_quantised(form.kind) for form in TILED)
    assert not any(takes_quantised(kind) for kind in (*FLOATS, Kind.Q4C))
