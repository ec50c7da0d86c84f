import math

import pytest

from dpt.curves import CURVES, Range, percent_of


def percent_to_sigma(percent):
    """As ComfyUI's discrete model samplings: falling, with an end beyond all at either side."""
    if percent <= 0:
        return 999999999.9
    return 0.0 if percent >= 1 else math.exp(3 - 6 * percent)


def test_percent_is_the_inverse_of_percent_to_sigma():
    for percent in (0.001, 0.2, 0.5, 0.999):
        assert percent_of(percent_to_sigma(percent), percent_to_sigma) == pytest.approx(percent, abs=1e-8)
    assert percent_of(1e6, percent_to_sigma) == pytest.approx(0, abs=1e-8)
    assert percent_of(0.0, percent_to_sigma) == 1


def test_curves_fall_from_all_to_nothing():
    assert [CURVES["constant"](position) for position in (0, 0.5, 1)] == [1, 1, 1]
    assert [CURVES["linear"](position) for position in (0, 0.25, 1)] == [1, 0.75, 0]
    assert [CURVES["cosine"](position) for position in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0], abs=1e-12)
    assert CURVES["cosine"](0.25) == pytest.approx((1 + 2**-0.5) / 2)


def test_strength_is_of_the_position_within_the_range():
    chosen = Range(eta=2.0, start=0.2, end=0.6, curve="linear")
    assert [chosen.strength(percent, 0) for percent in (0.2, 0.3, 0.6)] == pytest.approx([2.0, 1.5, 0.0])
    assert Range(eta=2.0, start=0.5, end=0.5, curve="cosine").strength(0.5, 0) == 2.0


def test_every_kth_step_of_the_range():
    chosen = Range(eta=1.0, every=3)
    assert [chosen.strength(0.5, nth) for nth in range(7)] == [1, 0, 0, 1, 0, 0, 1]


def test_a_range_holds_its_ends():
    chosen = Range(start=0.25, end=0.75)
    start, end = percent_to_sigma(0.25), percent_to_sigma(0.75)
    found = [chosen.holds(sigma, percent_to_sigma) for sigma in (start * 1.01, start, 1.0, end, end * 0.99)]
    assert found == [False, True, True, True, False]
    assert Range().holds(1e8, percent_to_sigma)
    assert Range().holds(1e-8, percent_to_sigma)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"curve": "square"}, "curve is 'square', expected one of constant, linear, cosine"),
        ({"start": 0.6, "end": 0.5}, "start_percent is 0.6 and end_percent 0.5"),
        ({"end": 1.5}, "end_percent 1.5"),
        ({"every": 0}, "every is 0"),
        ({"eta": -1.0}, "eta is -1.0"),
        ({"eta": math.nan}, "eta is nan"),
    ],
)
def test_wrong_settings_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        Range(**wrong)
