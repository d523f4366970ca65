"""What each step aims at, by hand."""

import math

import pytest

from sparsekv.retrofit.config import parse_config
from sparsekv.retrofit.training.target import Progress, channel_kept, step_target

BASE = {"model": "m", "output": "o", "data": [{"kind": "text", "names": ["t"]}], "steps_per_cr": 100, "max_cr": 8}


def test_the_ratio_rises_and_is_held() -> None:
    config = parse_config({**BASE, "hold_steps": 50})
    assert config.steps == 750
    targets = {100: 0.5, 300: 0.75, 700: 0.875, 750: 0.875}
    assert all(step_target(config, step) == (target, None) for step, target in targets.items())


def test_each_octave_of_held_ratios_is_drawn_as_often_and_by_seed_and_step_alone() -> None:
    config = parse_config({**BASE, "hold_steps": 400, "hold": "random"})
    assert step_target(config, 700) == (0.875, None)
    drawn = [step_target(config, step) for step in range(701, 1101)]
    assert {full for _, full in drawn} == {0.875}
    octaves = sorted(-math.log2(1 - target) for target, _ in drawn)
    assert octaves[0] >= 0 and octaves[-1] < 3
    assert max(abs(octave / 3 - i / 400) for i, octave in enumerate(octaves)) < 0.1
    assert drawn[5] == step_target(config, 706)
    assert drawn[5] != step_target(parse_config({**BASE, "hold_steps": 400, "hold": "random", "seed": 1}), 706)


def test_a_fraction_may_rest_at_its_target_but_not_below() -> None:
    at_target, rising, stalled = (Progress(2) for _ in range(3))
    for step in range(9):
        at_target.check(0.5, 0.52)
        rising.check(0.1 + 0.01 * step, 0.9)
    stalled.check(0.1, 0.9)
    stalled.check(0.1, 0.9)
    with pytest.raises(ValueError, match=r"does not move: 0\.1000 2 steps ago, 0\.1002 now, and the target is 0\.90"):
        stalled.check(0.1002, 0.9)


def test_the_channel_fades_before_the_schedule_begins() -> None:
    config = parse_config({**BASE, "source": "neuron", "trainable": "all", "max_cr": 3, "family": [2]})
    assert (config.steps, config.steps_to(2), config.final_cr) == (2200, 2100, 3)
    assert [channel_kept(config, step) for step in (1, 500, 2000, 2001)] == [0.9995, 0.75, 0, None]
    assert [step_target(config, step)[0] for step in (1, 2000, 2100, 2200)] == pytest.approx([0, 0, 0.5, 2 / 3])
    assert channel_kept(parse_config(BASE), 1) is None
    dmc = {"policy": "dmc", "source": "neuron", "trainable": "all", "lag": 1}
    config = parse_config({**BASE, **dmc, "max_cr": 3})
    assert [channel_kept(config, step) for step in (800, 1600, 2000, 2001)] == [0.5, 0, 0, None]
    with pytest.raises(ValueError, match="use trainable: all"):
        parse_config({**BASE, "source": "neuron"})
