"""The pool: sizes in words, and owners counted."""

import pytest
import torch

from sparsekv.cache.pages import PagePool, human_bytes, parse_bytes


def pool(pages: int = 4) -> PagePool:
    return PagePool(pages, page_size=8, head_dim=4, dtype=torch.float32)


@pytest.mark.parametrize(
    ("text", "count"),
    [(123, 123), ("123", 123), ("2GiB", 2**31), ("2 gib", 2**31), ("1.5kb", 1500), ("512 MiB", 2**29), ("7B", 7)],
)
def test_parse_bytes(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "many", "-1", "0", "2 GiBs", "1e9", "GiB", -5])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="is not a size of memory; write a number of bytes or one like '512MiB'"):
        parse_bytes(text)


def test_human_bytes():
    assert [human_bytes(n) for n in (0, 1536, 2**20, 5 * 2**30, 2**41)] == [
        "0 B",
        "1.5 KiB",
        "1 MiB",
        "5 GiB",
        "2048 GiB",
    ]


def test_pages_are_taken():
    p = pool()
    assert p.page_bytes == 2 * 8 * 4 * 4
    taken = p.take(3)
    assert len(set(taken.tolist())) == 3
    assert (p.pages_in_use, p.pages_free) == (3, 1)


def test_a_short_pool_names_the_bytes_and_takes_nothing():
    p = pool()
    p.take(2)
    with pytest.raises(ValueError, match=r"768 B \(3 pages\) are needed and 512 B of 1 KiB are free; pass a larger kv"):
        p.take(3)
    assert p.pages_free == 2
