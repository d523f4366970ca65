"""The dial by length: exact where it was measured, a line of tokens held between, honest where the window forbids."""

import math

import pytest

from sparsekv.modeling.dial import OffsetTable

WINDOW = 64
SHARES = [(-6.0, 0.5), (-2.0, 0.25), (0.0, 0.05)]
"""Offset -> share of the tokens before the window that is kept, as heads would that mark alike everywhere."""


def ratio(share: float, tokens: int) -> float:
    return tokens / (WINDOW + share * (tokens - WINDOW))


def table(*further: int) -> OffsetTable:
    return OffsetTable(
        window=WINDOW,
        offsets=[(offset, ratio(share, 2048)) for offset, share in SHARES],
        length=2048,
        ratios={length: [ratio(share, length) for _, share in SHARES] for length in further},
    )


@pytest.mark.parametrize("further", [(), (512,), (512, 8192)])
@pytest.mark.parametrize("tokens", [300, 512, 700, 2048, 5000, 8192, 30_000])
def test_heads_that_mark_alike_everywhere_get_the_ratio_at_any_length(further: tuple[int, ...], tokens: int) -> None:
    for offset, share in SHARES:
        assert table(*further).offset_for(ratio(share, tokens), tokens=tokens) == pytest.approx(offset)


def test_what_calibration_calls_16_serves_16() -> None:
    """It stops within 1 % of what it aims at."""
    dial = OffsetTable(window=10, offsets=[(0.0, 8.0), (1.0, 15.85)], length=2048)
    assert dial.offset_for(16) == pytest.approx(1 + 0.15 / 7.85)
    with pytest.raises(ValueError, match=r"the compression ratio is 16\.2; this adapter holds up to 15\.85"):
        dial.offset_for(16.2)


def test_measured_lengths_are_met_and_between_them_what_is_held_is_a_line() -> None:
    uneven = OffsetTable(window=10, offsets=[(0.0, 2.0), (1.0, 4.0)], length=100, ratios={400: [2.5, 8.0]})
    assert uneven.at(400) == [(0.0, 2.5), (1.0, 8.0)]
    held = (100 / 4 + 400 / 8) / 2
    assert uneven.at(250)[1][1] == pytest.approx(250 / held)
    assert uneven.offset_for(8, tokens=400) == 1


def test_longer_sequences_need_less_of_the_dial() -> None:
    offsets = [table(512).offset_for(3, tokens=tokens) for tokens in (300, 1000, 4000, 16_000)]
    assert offsets == sorted(offsets, reverse=True)
    assert len(set(offsets)) == 4


def test_a_ratio_that_the_window_forbids_is_said_and_the_table_s_own_length_serves(caplog) -> None:
    dial = table(512)
    assert dial.offset_for(4, tokens=100) == dial.offset_for(4)
    assert "a ratio of 4 is out of reach: below 256 tokens none has it, since the window of 64 is held" in caplog.text
    caplog.clear()
    assert dial.offset_for(9, tokens=700) == dial.offset_for(
        9
    )  # 1 token in 29 beyond the window: the heads keep 1 in 20
    assert "this adapter holds up to 7.31 at 700 tokens; the dial stands where 2048 tokens have it" in caplog.text
    caplog.clear()
    dial.offset_for(4, tokens=512)
    assert not caplog.records


def test_what_no_length_of_the_table_reaches_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the compression ratio is 40; this adapter holds up to 7\.307 at 700 tokens"):
        table().offset_for(40, tokens=700)
    with pytest.raises(ValueError, match=r"this adapter holds up to 12\.5"):
        table().offset_for(15)
    assert table().offset_for(15, tokens=30_000) < 0  # which a longer text reaches with ease
    with pytest.raises(ValueError, match="tokens is 0; it is the length that cr is meant for"):
        table().offset_for(4, tokens=0)


def test_a_table_of_unknown_length_stands_for_every_length() -> None:
    unknown = OffsetTable(window=WINDOW, offsets=[(-1.0, 2.0), (0.0, 4.0)])
    assert unknown.offset_for(3, tokens=100) == unknown.offset_for(3) == -0.5
    assert math.isinf(unknown.offset_for(1, tokens=100))
