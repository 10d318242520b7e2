"""The record of golden.py, one cell in forty: the whole of it takes a minute, `python tests/golden.py`."""

import golden
import pytest
from normkit import _core


@pytest.mark.skipif(_core.cuda == "shim", reason="the record is of the kernels of the CPU")
def test_record():
    record = golden.read(golden.RECORD)
    found = golden.found_lines(40)
    assert found.keys() <= record.keys()
    assert not list(golden.differences(record, found))


def test_a_changed_bit_is_seen():
    x = golden.data(1, golden.SHAPE)
    before = golden.digits((x, None))
    x.view("u1")[-1, -1, -1, -1] ^= 1
    assert golden.digits((x, None)) != before
    found = {"line": [("contiguous", golden.digits((x, None))), ("crop", "abc"), ("step", golden.LEFT_OUT)]}
    assert [*golden.differences({"line": before + "abc" + "xyz"}, found)] == [
        f"line, contiguous: {before} -> {golden.digits((x, None))}"
    ]
