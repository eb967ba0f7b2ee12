"""What options of benchmarks take."""

import argparse

import pytest

from benchmarks.options import numbers, positive, several


def test_several_values_have_commas_between():
    assert several("ours", "plan")("plan,ours") == ["plan", "ours"]
    assert numbers("4,16") == [4, 16]


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (several("ours", "plan"), "ours,their", "'their' is not one of ours, plan"),
        (numbers, "4,x", "'x' is not a number above 0"),
        (positive, "0", "'0' is not a number above 0"),
        (positive, "-1", "'-1' is not a number above 0"),
    ],
)
def test_what_is_no_choice_is_told(parse, text, message):
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        parse(text)
