"""A person's own JSONL file, whole or broken in every way: fedmini/data/jsonl.py."""

import gzip
import json
import re
import traceback

import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedmini.config import DataSection
from fedmini.data import Example, jsonl, load_population
from fedmini.errors import ConfigError

SECRET = "SECRETWORDS"
LINES = [json.dumps({"client": f"c{number % 3}", "prompt": f"p{number}", "response": SECRET}) for number in range(50)]
CONTENT = ("\n".join(LINES) + "\n").encode()
PACKERS = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.ZstdCompressor().compress}


def read(path, content):
    path.write_bytes(content)
    return [record.example for record in jsonl.read_jsonl(path, needs_client=True)]


def error_of(path, content):
    """The one-line message of the error; nothing that it drags along holds the text either."""
    with pytest.raises(ConfigError) as caught:
        read(path, content)
    chained, links = caught.value, []
    while chained is not None:
        links.append(chained)
        chained = chained.__cause__ or chained.__context__
    assert SECRET not in "".join(repr(vars(link)) + repr(link.args) + str(link) for link in links)
    assert not any(isinstance(link, json.JSONDecodeError | UnicodeDecodeError) for link in links)
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("suffix", PACKERS)
def test_plain_and_compressed_files_give_the_same_examples(tmp_path, suffix):
    examples = read(tmp_path / f"data{suffix}", PACKERS[suffix](CONTENT))

    assert examples == [Example(f"p{number}", SECRET) for number in range(50)]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_a_compressed_file_may_have_been_appended_to(tmp_path, suffix):
    pack = PACKERS[suffix]

    assert len(read(tmp_path / f"data{suffix}", pack(CONTENT) + pack(CONTENT))) == 100


def test_a_zst_file_written_as_a_stream_without_its_size_is_read(tmp_path):
    packer = zstandard.ZstdCompressor().compressobj()
    content = packer.compress(CONTENT * 500) + packer.flush()

    assert len(read(tmp_path / "data.jsonl.zst", content)) == 25_000


def test_windows_line_ends_a_byte_order_mark_and_blank_lines_are_accepted(tmp_path):
    content = b"\xef\xbb\xbf" + CONTENT.replace(b"\n", b"\r\n") + b"\r\n   \r\n"

    assert len(read(tmp_path / "data.jsonl", content)) == 50


def test_the_last_line_needs_no_line_end(tmp_path):
    assert len(read(tmp_path / "data.jsonl", CONTENT.rstrip())) == 50


def test_line_separators_of_unicode_inside_a_text_do_not_end_the_line(tmp_path):
    text = "one\u2028two\u0085three"
    line = json.dumps({"client": 1, "text": text}, ensure_ascii=False).encode()

    assert read(tmp_path / "data.jsonl", line) == [Example(None, text)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f'{{"client": "a", "text": "{SECRET}'.encode(), "it is not a JSON object on one line"),
        (f'"{SECRET}"'.encode(), "expected an object .* got str"),
        (b"[" * 100_000, "it is not a JSON object on one line"),
        (b'{"client": ' + b"9" * 5000 + b', "text": "SECRETWORDS"}', "it is not a JSON object on one line"),
        (b'{"client": 1, "text": "SECRETWORDS\xff"}', "it is not UTF-8 text"),
        (json.dumps({"client": 1, "text": SECRET}).encode("utf-16-le"), "it is not a JSON|it is not UTF-8"),
        (json.dumps({"text": SECRET}).encode(), '"client" is missing'),
        (json.dumps({"client": SECRET, "prompt": SECRET}).encode(), '"response" is missing'),
        (json.dumps({"client": SECRET, "text": ""}).encode(), '"text": expected a non-empty string, got an empty one'),
        (json.dumps({"client": SECRET, "text": 5}).encode(), '"text": expected a non-empty string, got int'),
        (json.dumps({"client": SECRET, "text": SECRET + "\ud800"}).encode(), "half of a surrogate pair"),
        (json.dumps({"client": 1, "text": SECRET * 2**17}).encode(), "longer than 1048576 bytes"),
    ],
)
@pytest.mark.parametrize("suffix", PACKERS)
def test_a_bad_line_is_named_by_file_and_number_and_never_shown(tmp_path, suffix, line, message):
    path = tmp_path / f"data{suffix}"
    content = f"{LINES[0]}\n\n{LINES[1]}\n".encode() + line + b"\n" + CONTENT

    error = error_of(path, PACKERS[suffix](content))

    assert error.startswith(f"{path}, line 4: ")
    assert re.search(message, error)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_a_compressed_file_cut_anywhere_is_refused(tmp_path, suffix):
    packed = PACKERS[suffix](CONTENT)

    for length in range(2, len(packed)):
        assert "ends too early" in error_of(tmp_path / f"data{suffix}", packed[:length])


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_a_file_that_is_not_compressed_as_it_says_is_refused(tmp_path, suffix):
    assert "line 1: the compressed file is damaged" in error_of(tmp_path / f"data{suffix}", CONTENT)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_garbage_behind_a_compressed_file_is_refused(tmp_path, suffix):
    content = PACKERS[suffix](CONTENT) + b"garbage that is no archive"

    assert "the compressed file is damaged" in error_of(tmp_path / f"data{suffix}", content)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_a_small_file_that_unpacks_to_much_is_refused_at_its_first_line(tmp_path, suffix):
    bomb = PACKERS[suffix](b" " * 2**28)

    assert "line 1: the line is longer" in error_of(tmp_path / f"data{suffix}", bomb)


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_missing_file_and_a_folder_are_refused(tmp_path, suffix):
    path = tmp_path / f"data{suffix}"

    with pytest.raises(ConfigError, match=r"can't read the data file .*: No such file"):
        list(jsonl.read_jsonl(path, needs_client=True))
    path.mkdir()
    with pytest.raises(ConfigError, match=r"can't read the data file .*: Is a directory"):
        list(jsonl.read_jsonl(path, needs_client=True))


def test_a_population_is_read_from_a_file(tmp_path):
    (tmp_path / "data.jsonl").write_bytes(CONTENT)

    population = load_population(DataSection(source=str(tmp_path / "data.jsonl"), held_out_devices=1))

    assert sorted(population.devices.keys() | population.held_out.keys()) == ["c0", "c1", "c2"]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
NEAR_ROWS = st.dictionaries(
    st.sampled_from(["client", "prompt", "response", "text", "extra"]), st.text(max_size=5) | JSON_VALUES, max_size=5
)
ANY_LINE = st.binary(max_size=40) | NEAR_ROWS.map(lambda row: json.dumps(row).encode())


@given(lines=st.lists(ANY_LINE, max_size=6), suffix=st.sampled_from(sorted(PACKERS)), flip=st.none() | st.integers(0))
@example(lines=[b"\xff\xfe"], suffix=".jsonl", flip=None)
@settings(max_examples=400, deadline=None)
def test_any_bytes_give_examples_or_one_line_with_file_and_number(tmp_path_factory, lines, suffix, flip):
    path = tmp_path_factory.getbasetemp() / f"fuzz{suffix}"
    content = bytearray(PACKERS[suffix](b"\n".join(lines)))
    if flip is not None and content:
        content[flip // 8 % len(content)] ^= 1 << flip % 8

    try:
        examples = read(path, bytes(content))
    except ConfigError as error:
        assert str(error).startswith(f"{path}, line ") and "\n" not in str(error)
        return
    for read_example in examples:
        assert read_example.response.strip() and read_example.response.encode()
        assert read_example.prompt is None or (read_example.prompt.strip() and read_example.prompt.encode())
