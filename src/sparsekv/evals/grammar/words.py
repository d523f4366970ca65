"""Names and values, made up: one to eight tokens long. Of every list of parts a third is the evaluation's."""

import string

import numpy as np

_PARTS = {
    "start": "Bran Kel Tor Mar Sel Vin Dor Hal Nor Pel Rav Sten Thal Ulm Wes Yar Zan Cor Fen Gar Lun Ost Quil Jor",
    "middle": "a e i o u ar en il or un ai ei",
    "end": "dan mor ric sel tin vey wick bert dra fin gard hild lan mund nas rell stad th ver zo by ford",
    "town_end": "ham ton burg field port stead mouth ville haven bridge wick dale more cliff worth",
    "given": "Ada Bela Cyril Dora Edgar Flora Gustav Hilda Igor Jana Karl Lotte Milo Nina Otto Paula Rupert Sonja Theo "
    "Ulla Viktor Wanda Xaver Yvonne",
    "job": "glazier cooper surveyor midwife tailor miller optician plumber librarian beekeeper falconer locksmith "
    "chemist saddler potter judge courier gardener",
    "food": "barley rhubarb walnuts herring lentils cabbage figs turnips oysters parsley dates almonds pumpkin "
    "gherkins mustard leeks raspberries buckwheat",
    "thing": "anvil compass bellows telescope ladle saddle chisel thimble lute trowel goblet abacus harpoon pulley "
    "lectern bobbin quill sundial",
    "animal": "heron badger lynx otter stork mole beaver hare crane stag raven pike weasel moth bison toad swan mule",
    "colour": "crimson turquoise ochre violet scarlet beige teal ivory maroon indigo amber khaki",
    "drink": "rum mead perry whey sherry cordial kefir absinthe vermouth barley-water port punch",
    "pastime": "juggling knitting sailing fencing falconry archery gliding whittling origami skating pottery diving",
    "adjective": "hollow gilded silent crooked frozen scarlet narrow ancient burning velvet broken winding hidden "
    "marble tangled pale nimble bitter",
    "noun": "gate orchard tower lantern staircase river anchor chimney meadow bell ladder cellar mirror canal hedge "
    "well",
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "month": "January February March April May June July August September October November December",
}
_ALL_SEEN = ("day", "month", "middle")
"""Lists too short to be parted."""


def entity(rng: np.random.Generator, kind: str, *, unseen: bool) -> str:
    """A name: a person's, or one with what it is before it."""
    return value(rng, "person", unseen=unseen) if kind == "person" else f"the {kind} {_name(rng, unseen)}"


def value(rng: np.random.Generator, kind: str, *, unseen: bool) -> str:
    """A value of a kind: a part of speech above, or one that is made up of them."""

    def part(name: str) -> str:
        return str(rng.choice(words(name, unseen=unseen)))

    if kind in _PARTS:
        return part(kind)
    if kind == "person":
        return f"{part('given')} {_name(rng, unseen)}"
    if kind == "town":
        return part("start") + part("town_end")
    if kind == "phrase":
        return f"the {part('adjective')} {part('noun')} of {part('start')}{part('town_end')}"
    if kind == "code":
        letters = "".join(rng.choice(list(string.ascii_uppercase), 2))
        return f"{letters}-{rng.integers(10, 10_000)}"
    if kind == "date":
        return f"{rng.integers(1, 29)} {part('month')} {rng.integers(1700, 2030)}"
    if kind == "amount":
        return f"{rng.integers(2, 1000)} {rng.choice(['crowns', 'guilders', 'talers', 'marks'])}"
    low, high = {"digits": (10_000, 10_000_000), "number": (11, 10_000), "year": (1500, 2030)}[kind]
    return str(rng.integers(low, high))


def made_up(kind: str) -> bool:
    """Whether values of a kind are put together, so that their end cannot be guessed from their beginning, and are not
    one word of a list."""
    return kind not in _PARTS


def words(name: str, *, unseen: bool) -> list[str]:
    """The words of a list that training uses, two of three, or the evaluation's."""
    found = _PARTS[name].split()
    return found if name in _ALL_SEEN else [word for i, word in enumerate(found) if (i % 3 == 2) == unseen]


def _name(rng: np.random.Generator, unseen: bool) -> str:
    return "".join(str(rng.choice(words(name, unseen=unseen))) for name in ("start", "middle", "end"))
