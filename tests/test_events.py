"""Events are one line each, whatever is in their fields, and nothing that goes wrong with the stream stops the caller."""

import io
import json

from fedmini import events


def lines(log_format: events.Format, *emitted: tuple[str, dict[str, events.Field]]) -> list[str]:
    stream = io.StringIO()
    emit = events.to_stream(stream, log_format, "server", clock=lambda: 0.0)
    for name, fields in emitted:
        emit(name, **fields)
    return stream.getvalue().splitlines()


def test_json_events_are_one_object_a_line() -> None:
    (line,) = lines("json", ("round.committed", {"round": 3, "seconds": 0.25, "reason": "two\nlines", "late": None}))
    assert json.loads(line) == {
        "time": "1970-01-01T00:00:00.000+00:00",
        "source": "server",
        "event": "round.committed",
        "round": 3,
        "seconds": 0.25,
        "reason": "two\nlines",
        "late": None,
    }


def test_text_events_are_one_line_each_and_show_no_control_characters() -> None:
    (line,) = lines("text", ("device.refused", {"device": "anna", "reason": "two\nlines \x1b[31m", "share": 0.123456}))
    assert line == (
        '1970-01-01T00:00:00Z server: device.refused device=anna reason="two\\nlines \\u001b[31m" share=0.123456'
    )


def test_a_long_field_is_cut() -> None:
    (line,) = lines("json", ("a", {"reason": "x" * 10_000}))
    assert len(json.loads(line)["reason"]) == events.MAX_FIELD_CHARACTERS + 3


def test_a_closed_stream_stops_nothing() -> None:
    stream = io.StringIO()
    emit = events.to_stream(stream, "text", "server")
    stream.close()
    emit("after", closed=True)


def test_a_line_of_another_process_is_shown_as_ones_own() -> None:
    (line,) = lines("json", ("round.committed", {"round": 3}))
    assert events.relayed(line, "json", "gate") == line
    assert events.relayed(line, "text", "gate") == "1970-01-01T00:00:00Z server: round.committed round=3"


def test_what_a_process_says_beside_its_log_becomes_an_event() -> None:
    for said in ("Traceback (most recent call last):", "[1, 2]", '{"time": 3}', ""):
        found = json.loads(events.relayed(said, "json", "gate"))
        assert (found["source"], found["event"], found["line"]) == ("gate", "process.said", said)
