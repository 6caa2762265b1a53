"""What follows from an architecture's fields.  pytest tests/shared/model/test_architecture.py"""

from dataclasses import replace

import numpy as np
import pytest

from tests.activations import NAMES, SPARSE, described
from tests.shared.model.specs import SPEC, changed
from warmfront.shared.model.architecture import ACTIVATIONS, Attention, FeedForward, Positions, Rotary

SLOW, FAST = Rotary(frequencies=(0.5, 0.25)), Rotary(frequencies=(2.0, 1.0))


def test_score_scale() -> None:
    attention = Attention(heads=4, kv_heads=2, head_dim=16)
    assert attention.score_scale == 0.25
    assert replace(attention, scale=0.1).score_scale == 0.1


def test_rows_of_the_heads() -> None:
    attention = Attention(heads=4, kv_heads=2, head_dim=24)
    assert (attention.q_rows, attention.kv_rows) == (96, 48)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_zero_up_to_somewhere_is_sparse(name: str) -> None:
    feed_forward = described(name)
    assert feed_forward.sparse == (name in SPARSE)
    assert feed_forward.activation_name == name
    assert ACTIVATIONS[feed_forward.activation_code] == name.partition(":")[0]
    assert changed(SPEC, "architecture.feed_forward", feed_forward).sparse == feed_forward.sparse
    assert (feed_forward.closed >= 0) == feed_forward.sparse


def test_thresholds() -> None:
    assert described("fatrelu:0.01").closed == np.float32(0.01)
    assert described("fatrelu:0.01").activated("relu") == FeedForward(activation="relu")
    assert described("swiglu_oai:7.0").limit == 7
    wrongs = ("fatrelu", "relu:0.1", "fatrelu:much", "fatrelu:nan", "softplus", "swiglu_oai", "swiglu_oai:0")
    for wrong in wrongs:
        with pytest.raises(ValueError, match=r"parameter|float|activation"):
            described(wrong)


def test_the_power_of_the_input_that_bounds_the_output() -> None:
    names = ("silu", "drelu", "relu2", "swiglu_oai:7.0")
    assert [described(name).degree for name in names] == [2, 2, 3, 0]


@pytest.mark.parametrize("limit", [0.05, 1.0, 7.0])
def test_the_bound_of_an_activation_that_has_one(limit: float) -> None:
    numbers = np.linspace(-20, 20, 401)
    gates, ups = np.minimum(numbers, limit)[:, None], np.clip(numbers, -limit, limit)
    most = np.abs(gates / (1 + np.exp(-1.702 * gates)) * (ups + 1)).max()
    bound = described(f"swiglu_oai:{limit}").most
    assert bound is not None
    assert most <= bound < 3 * most
    assert [FeedForward(activation=name, gated=False).degree for name in ("relu", "relu2")] == [1, 2]


def test_matrices_of_a_neuron() -> None:
    assert FeedForward(activation="silu").matrices == ("gate", "up", "down")
    assert FeedForward(activation="relu", gated=False).matrices == ("up", "down")


def test_rotary_table_of_a_layer() -> None:
    one, none = Positions(rotary=(SLOW,)), Positions()
    assert [one.table_of(i) for i in range(3)] == [0] * 3
    assert [none.table_of(i) for i in range(3)] == [-1] * 3
    mixed = Positions(rotary=(SLOW, FAST), rotary_of_layer=(1, -1, 0))
    assert [mixed.table_of(i) for i in range(3)] == [1, -1, 0]
    assert SLOW.dim == 4


def test_tables_of_several_sizes() -> None:
    short = Rotary(frequencies=(0.25,))
    tables = Positions(rotary=(SLOW, short)).tables(9)
    assert tables.shape == (2, 2, 9, 2)
    np.testing.assert_array_equal(tables[0], SLOW.cos_sin(9))
    np.testing.assert_array_equal(tables[1, :, :, :1], short.cos_sin(9))
    assert not tables[1, :, :, 1].any()
    assert Positions().tables(9).shape == (0, 2, 9, 0)


def test_frequencies_for_long_contexts() -> None:
    """They are those of the whole run: keys of the cache are not rotated again."""
    rotary = Rotary(frequencies=(1.0, 0.5), long_frequencies=(0.5, 0.125), original_context=8)
    np.testing.assert_array_equal(rotary.cos_sin(8), Rotary(frequencies=(1.0, 0.5)).cos_sin(8))
    np.testing.assert_array_equal(rotary.cos_sin(9), Rotary(frequencies=(0.5, 0.125)).cos_sin(9))


def test_cosines_and_sines() -> None:
    """Angles of far positions are exact: in float32 alone they would not be."""
    rotary = Rotary(frequencies=(1.0, 0.1234567), magnitude=1.5)
    cos, sin = rotary.cos_sin(200_001)
    assert cos.dtype == np.float32
    assert cos.shape == sin.shape == (200_001, 2)
    for position in (0, 1, 200_000):
        angles = position * np.array(rotary.frequencies, np.longdouble)
        np.testing.assert_allclose(cos[position], 1.5 * np.cos(angles), atol=2e-7)
        np.testing.assert_allclose(sin[position], 1.5 * np.sin(angles), atol=2e-7)
