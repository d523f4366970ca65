"""Devices by name and from a file of one's own."""

import pytest

from sparsekv.cost import HARDWARE, Hardware, hardware_of

OWN = "flops: 1.0e15\nbandwidth: 2e12\nmemory: 64000000000\npower: 500\n"


def test_the_devices_of_the_plan():
    assert set(HARDWARE) == {"h100-sxm", "h200", "a100", "b200", "l40s", "rtx-4090", "cpu"}
    assert (HARDWARE["h100-sxm"].flops, HARDWARE["h100-sxm"].bandwidth) == (989.5e12, 3.35e12)


@pytest.mark.parametrize("extra", ["", "name: mine\ndevice: My GPU\n"])
def test_a_file_of_ones_own(tmp_path, extra):
    file = tmp_path / "own.yaml"
    file.write_text(OWN + extra)
    name, device = ("mine", "My GPU") if extra else ("own", None)
    wanted = Hardware(name=name, flops=1e15, bandwidth=2e12, memory=64e9, power=500, device=device)
    assert hardware_of(str(file)) == wanted


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (OWN + "colour: red\n", "colour"),
        (OWN.replace("power: 500", ""), "power"),
        (OWN.replace("500", "lots"), "power.*'lots'.*number"),
        (OWN.replace("500", "-1"), "above 0"),
        (OWN.replace("500", ".nan"), "above 0"),
        ("- a list\n", "must hold"),
        ("a: [", "not YAML"),
        (None, "cannot read"),
    ],
)
def test_a_file_that_is_wrong(tmp_path, text, words):
    file = tmp_path / "own.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=words) as error:
        hardware_of(str(file))
    assert "\n" not in str(error.value)


def test_an_unknown_device():
    with pytest.raises(ValueError, match=r"'h900'.*h100-sxm.*YAML"):
        hardware_of("h900")
