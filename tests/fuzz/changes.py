"""Inputs made from others: a few bytes changed, dropped, repeated or taken from another."""

from __future__ import annotations

import random
from collections.abc import Sequence

from fuzz import LONGEST

# what readers stumble over
ODD = (
    *(b"\x00", b"\xff", b"\xff\xff\xff\xff\xff\xff\xff\x7f", b"\xed\xa0\x80", b"\xef\xbb\xbf"),
    *(b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"-1", b"0", b"0.5", b"null", b"true", b'""'),
    *(
        b"{}",
        b"[]",
        b"[" * 2000,
        b'{"a":' * 2000,
        b'"',
        b"\\",
        b"\\ud800",
        b"\n",
        b"\r",
        b",",
        b"=",
    ),
    *(b"../", b"~", b"~nobody/", b"\x1b[2J", b"(a+)+$", b"'''", b"1979-05-27", b"inf"),
)


def changed(seeds: Sequence[bytes], draws: random.Random) -> bytes:
    """A seed after one to eight changes."""
    data = bytearray(draws.choice(seeds))
    for _ in range(draws.randint(1, 8)):
        at = draws.randrange(len(data) + 1)
        end = min(len(data), at + draws.choice((1, 1, 2, 4, 8, 32, 256)))
        match draws.randrange(7):
            case 0 if at < len(data):
                data[at] ^= 1 << draws.randrange(8)
            case 1 if at < len(data):
                data[at] = draws.randrange(256)
            case 2:
                del data[at:end]
            case 3:
                data[at:at] = data[at:end] * draws.choice((1, 2, 100))
            case 4:
                data[at:end] = draws.choice(ODD)
            case 5:
                data[at:at] = draws.choice(ODD)
            case _:
                other = draws.choice(seeds)
                start = draws.randrange(len(other) + 1)
                data[at:end] = other[start : start + draws.choice((4, 32, 1 << 16))]
    return bytes(data[:LONGEST])
