"""Lists of neurons and masks.  pytest tests/shared/kernels/feed_forward/test_neuron_lists.py"""

import numpy as np

from warmfront.shared.kernels.feed_forward.neuron_lists import group_start, list_masked, set_bit


def test_set_bit() -> None:
    words = np.zeros(3, np.uint32)
    for neuron in (0, 31, 32, 70, 31):
        set_bit(words, neuron)
    assert words.tolist() == [1 | 1 << 31, 1, 1 << 6]


def test_group_start() -> None:
    listed = np.array([0, 5, 31, 32, 64, 65, 95], np.int32)
    assert [group_start(listed, 7, i) for i in range(8)] == [0, 3, 3, 3, 4, 7, 7, 7]
    # Of the first five alone.
    assert [group_start(listed, 5, i) for i in range(6)] == [0, 3, 3, 3, 4, 5]
    assert group_start(listed, 0, 0) == 0


def test_list_masked() -> None:
    words = np.array([0, 0xFFFFFFFF, 0x80000001, 0x00000100, 0xFFFFFFFF], np.uint32)
    listed = np.full(5 * 32, -1, np.int32)
    count = list_masked(words, 4, listed)
    bits = np.unpackbits(words[:4].view(np.uint8), bitorder="little")
    assert listed[:count].tolist() == np.flatnonzero(bits).tolist()
    assert (listed[count:] == -1).all()
    assert list_masked(words, 1, listed) == 0
