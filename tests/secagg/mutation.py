"""hypothesis strategies that spoil inputs: as bytes, as trees of values, and from nothing.

A valid input is taken apart (`Form.load`), changed in a few places and put together again, so that it comes past the
outer layers of a parser; its bytes are changed too, and some inputs never were valid.
"""

import json
import math
import struct
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import tomli_w
from hypothesis import strategies as st

from fedmini.privacy import chain

MAX_BYTES = 2**16
PLAIN = (0, 1, -1, 2, 127, 128, 150, 151, 4096, 4097, 2**31 - 1, 2**31, 2**53 + 1, 2**63 - 1, True, False)
FLOATS = (0.0, -0.0, 0.5, 1.0, 1e-320, 1e308, math.inf, -math.inf, math.nan)
TEXTS = ("", "a", "d000", "d001", "a" * 128, "a" * 129, "\n", "\0", "\u00e9" * 64, "\u200b", "\U0001f600", "00" * 32)


@dataclass(frozen=True, repr=False)
class Form:
    """How the inputs of a parser are taken apart and put together, and what its readers may trip over."""

    load: Callable[[bytes], Any]
    dump: Callable[[Any], bytes]
    atoms: Sequence[Any]
    bombs: st.SearchStrategy[bytes]

    def written(self, tree: Any) -> bytes:
        """The tree as bytes; what the format has no place for, as Python shows it."""
        try:
            return self.dump(tree)
        except (TypeError, ValueError, OverflowError, AttributeError, RecursionError):
            return repr(tree).encode("utf-8", "surrogatepass")


WAYS = ("tree", "tree", "tree", "bytes", "bytes", "both", "bomb", "bomb", "noise", "nothing")


@st.composite
def inputs(draw: st.DrawFn, seeds: st.SearchStrategy[bytes], form: Form) -> bytes:
    """Mostly valid inputs that were changed in one to four places."""
    way = draw(st.sampled_from(WAYS))
    if way == "noise":
        return draw(st.binary(max_size=300))
    if way == "bomb":
        return draw(form.bombs)
    content = draw(seeds)
    if way in ("tree", "both"):
        holder = [form.load(content)]
        for _ in range(draw(st.integers(1, 4))):
            _change_tree(draw, holder, form, seeds)
            holder = holder or [None]  # the whole may be what was deleted
        content = form.written(holder[0])
    if way in ("bytes", "both"):
        for _ in range(draw(st.integers(1, 4))):
            content = _change_bytes(draw, content, form, seeds)
    return content[:MAX_BYTES]


def _nodes(tree: Any) -> list[tuple[Any, Any]]:
    """Where each value in a tree stands: its container, and its place in it."""
    found = []
    waiting = [tree]
    while waiting:
        container = waiting.pop()
        places = range(len(container)) if isinstance(container, list) else list(container)
        for place in places:
            found.append((container, place))
            if isinstance(container[place], list | dict):
                waiting.append(container[place])
    return found


def _change_tree(draw: st.DrawFn, holder: list[Any], form: Form, seeds: st.SearchStrategy[bytes]) -> None:
    """Change one place of the tree that the holder holds, in place."""
    nodes = _nodes(holder)
    container, place = nodes[draw(st.integers(0, len(nodes) - 1))]
    number = draw(st.integers(0, 2**16 - 1))
    match draw(st.sampled_from(("atom", "atom", "nudge", "nudge", "own", "graft", "delete", "repeat", "swap", "wrap"))):
        case "atom":
            container[place] = _copied(form.atoms[number % len(form.atoms)])
        case "nudge":
            container[place] = _nudged(container[place], number)
        case "own":
            other, elsewhere = nodes[number % len(nodes)]
            container[place] = _copied(other[elsewhere])
        case "graft":
            donor = _nodes([form.load(draw(seeds))])
            other, elsewhere = donor[number % len(donor)]
            container[place] = other[elsewhere]
        case "delete":
            del container[place]
        case "repeat" if isinstance(container, list):
            times = (0, 2, 3, 200 if len(nodes) < 100 else 2)[number % 4]
            container[place : place + 1] = [_copied(container[place]) for _ in range(times)]
        case "repeat":
            container[f"{place}{number % 3}"] = _copied(container[place])
        case "swap":
            other, elsewhere = nodes[number % len(nodes)]
            first, second = _copied(container[place]), _copied(other[elsewhere])
            container[place], other[elsewhere] = second, first
        case "wrap":
            for _ in range((1, 2, 5, 100)[number % 4]):
                container[place] = [container[place]]


def _copied(tree: Any) -> Any:
    if isinstance(tree, list):
        return [_copied(item) for item in tree]
    if isinstance(tree, dict):
        return {key: _copied(item) for key, item in tree.items()}
    return tree


def _nudged(value: Any, number: int) -> Any:
    """A value of the same type, mostly, that is a little different."""
    match value:
        case bool() | None:
            return not value
        case int():
            return (value + 1, value - 1, -value, 2 * value, float(value % 2**53), value + 2**31)[number % 6]
        case float():
            return (-value, 2 * value, value / 3, math.nextafter(value, math.inf), 1e300 * value)[number % 5]
        case str():
            half = len(value) // 2
            return (value[1:], value + "0", value.upper(), value[::-1], value[:half], " " + value)[number % 6]
        case bytes():
            flipped = bytearray(value or b"\0")
            flipped[number % len(flipped)] ^= 1 << number % 8
            return (bytes(flipped), bytes(flipped), value[1:], value + b"\0", bytes(len(value)))[number % 5]
        case list():
            return (value[::-1], value[1:], value + value, [], [*value, None])[number % 5]
        case _:
            return None


def _change_bytes(draw: st.DrawFn, content: bytes, form: Form, seeds: st.SearchStrategy[bytes]) -> bytes:
    """The content with one stretch changed, cut out, doubled or taken from elsewhere."""
    start = draw(st.integers(0, len(content)))
    size = draw(st.integers(0, 40))
    before, part, after = content[:start], content[start : start + size], content[start + size :]
    match draw(st.sampled_from(("flip", "flip", "write", "cut", "delete", "repeat", "splice", "bomb"))):
        case "flip":
            return before + bytes([after[0] ^ (1 << size % 8)]) + after[1:] if after else content
        case "write":
            return before + draw(st.binary(max_size=12)) + after
        case "cut":
            return before
        case "delete":
            return before + after
        case "repeat":
            return before + part * draw(st.integers(2, 50)) + after
        case "splice":
            return before + draw(seeds)[start:]
        case _:
            return before + draw(form.bombs) + after


# MessagePack

_LENGTHS = st.sampled_from((0, 1, 2, 15, 16, 150, 255, 4096, 4097, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1))
_DEPTHS = st.sampled_from((1, 2, 3, 10, 100, 500, 1000, 1023, 1024, 1025, 2000))
_PREFIXES = st.sampled_from((b"", b"\x93\x01\x01", b"\x98\x01\x02", b"\x95\x01\x05", b"\x94\x02\x01"))


def _header(code: int, width: str, length: int) -> bytes:
    return bytes([code]) + struct.pack(f">{width}", length % (1 << 8 * struct.calcsize(width)))


# Lists and maps of so many items, where 150 and 4096 are what a reader here may allow.
_containers = st.sampled_from(
    (b"\xdc\x10\x00", b"\xdc\x00\x96", b"\xdd\x00\x00\x10\x00", b"\xdc\xff\xff", b"\xdd\xff\xff\xff\xff", b"\x91", b"\x9f",
     b"\xde\x10\x00", b"\xdf\xff\xff\xff\xff", b"\x81", b"\x8f")
)  # fmt: skip
_declared = st.builds(
    lambda kind, length: _header(*kind, length),
    st.sampled_from(
        ((0xC4, "B"), (0xC5, "H"), (0xC6, "I"), (0xD9, "B"), (0xDA, "H"), (0xDB, "I"), (0xC7, "B"), (0xC8, "H"), (0xC9, "I"))
    ),
    _LENGTHS,
)  # fmt: skip
_small = st.sampled_from(
    (b"\x90", b"\x80", b"\xa0", b"\xc0", b"\x91\xc0", b"\x91\x91\xc0", b"\xa2\xc4\x80", b"\xa4\xf0\x9f\x98\x80", b"\xc4\x00",
     b"\xc4\x02ab", b"\xcd\x80\x80", b"\xcb\x7f\xf0\0\0\0\0\0\0", b"\xd4\x01a", b"\xc1", b"\x91" * 40 + b"\xc0")
)  # fmt: skip


def _msgpack(content: bytes) -> Any:
    return msgpack.unpackb(content, use_list=True, strict_map_key=False)


MSGPACK = Form(
    load=_msgpack,
    dump=lambda tree: msgpack.packb(tree, use_bin_type=True),
    atoms=(
        None, *PLAIN, *FLOATS, *TEXTS, 2**64 - 1, -(2**63), [], {}, {"a": 1}, [[]], [None], b"", b"d000", bytes(31), bytes(32),
        bytes(33), b"\xff" * 32, bytes(64), bytes(80), bytes(96), msgpack.ExtType(1, b"a"), msgpack.Timestamp(1),
    ),
    bombs=st.one_of(
        # lists that announce what doesn't come, in one another; many small things; a length that is a lie
        st.builds(lambda prefix, header, depth: prefix + header * depth, _PREFIXES, _containers, _DEPTHS),
        st.builds(
            lambda prefix, item, many: prefix + _header(0xDC, "H", many) + item * many, _PREFIXES, _small,
            st.integers(0, 4097),
        ),
        st.builds(lambda prefix, header, more: prefix + header + more, _PREFIXES, _declared, st.binary(max_size=20)),
        st.builds(lambda headers: b"".join(headers), st.lists(_containers | _declared | _small, max_size=60)),
    ),
)  # fmt: skip


# Texts

_REPEATED = st.sampled_from((1, 2, 20, 300, 990, 1010, 4299, 4301, 6000))


def _json(tree: Any) -> bytes:
    return json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()


def _json_line(tree: Any) -> bytes:
    return _json(tree) + b"\n"


_JSON_ATOMS = (
    None, *PLAIN, *FLOATS, *TEXTS, 10**30, 10**400, "\ud800", [], {}, [[]], {"": 0}, [0, [1, {"a": "b"}]], "NaN", "zz" * 32,
    "local", "shared", "server", "example", "device",
)  # fmt: skip
_JSON_BOMBS = st.builds(
    lambda text, times, end: text * times + end,
    st.sampled_from(
        (b"[", b'{"a":', b"[[],", b"[{},", b'[{"a":0},', b"1", b"-1", b"0.1", b"1e9", b'"', b"\\u0000", b"\\ud800", b'"",', b"\n",
         b" ", b"NaN", b"\xef\xbb\xbf", b"\xff\xfe", b"\x00", b"1e999,", b'"format":"x",', b"[1e999,", b"\xed\xa0\x80")
    ),
    _REPEATED,
    st.sampled_from((b"", b"]", b"}", b'"', b"0", b"e9")),
)  # fmt: skip
JSON = Form(json.loads, _json, _JSON_ATOMS, _JSON_BOMBS)
JSON_LINE = Form(json.loads, _json_line, _JSON_ATOMS, _JSON_BOMBS)


def _lines(content: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in content.splitlines()]


def _dump_lines(tree: Any) -> bytes:
    return b"".join(json.dumps(line, separators=(",", ":")).encode() + b"\n" for line in tree)


def _entries(content: bytes) -> list[dict[str, Any]]:
    """The lines of a ledger without what links them."""
    links = (*chain.LINK, "check")
    return [{key: value for key, value in line.items() if key not in links} for line in _lines(content)]


def _dump_entries(tree: Any) -> bytes:
    return chain.encode(chain.link([], tree))


LEDGER = Form(_lines, _dump_lines, _JSON_ATOMS, _JSON_BOMBS)
LEDGER_CHAINED_ANEW = Form(_entries, _dump_entries, _JSON_ATOMS, _JSON_BOMBS)

TOML = Form(
    load=lambda content: tomllib.loads(content.decode()),
    dump=lambda tree: tomli_w.dumps(tree).encode(),
    atoms=(*PLAIN, *FLOATS, *TEXTS, 10**30, 10**400, [], {}, [[]], {"a": 1}, {"max_epsilon": 1.0}, "1", "true"),
    bombs=st.builds(
        lambda key, text, times, end: key + text * times + end,
        st.sampled_from((b"", b"a = ", b"max_devices = ", b"lifetime_epsilon = ", b"lifetime_epsilon = 0x", b"\n[device]\n")),
        st.sampled_from(
            (b"[", b"{a=", b"1", b"f", b"0.1", b"[[", b"a.", b"[a]\n", b"[[a]]\n", b'"', b"'''", b"\\u0000", b"1e9", b"\xff",
             b"\0", b"1979-05-27T07:32:00Z", b"nan", b"#", b"\r", b"a=1\n", b'"\\n\\u001b"=')
        ),
        _REPEATED,
        st.sampled_from((b"", b"]", b"}", b"= 1\n", b"\n")),
    ),
)  # fmt: skip

PEM = Form(
    load=lambda content: content.decode("latin-1").split("\n"),
    dump=lambda tree: "\n".join(map(str, tree)).encode(),
    atoms=(
        "", "=", "A" * 64, "-----BEGIN PUBLIC KEY-----", "-----END PUBLIC KEY-----", "Proc-Type: 4,ENCRYPTED", "MCowBQYDK2Vw",
    ),
    bombs=st.builds(
        lambda text, times: text * times, st.sampled_from((b"A", b"-", b"=", b"\n", b"MA==", b"MIAA")), _REPEATED
    ),
)  # fmt: skip
