"""Boxes of grounding answers."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from runtime.requests.boxes import Box, parse_boxes

CUP = Box("the cup", 12, 34, 567, 890)


def test_the_papers_form_gives_reference_and_corners() -> None:
    assert parse_boxes("<ref>the cup</ref><box>(12, 34), (567, 890)</box>") == [CUP]


def test_an_answer_without_boxes_gives_none() -> None:
    assert parse_boxes("") == []
    assert parse_boxes("At (12, 34), (567, 890) stands a cup.") == []


def test_several_boxes_come_in_order_with_their_own_references() -> None:
    text = (
        "Here <ref>the cup</ref><box>(12, 34), (567, 890)</box> and "
        "<ref>a dog</ref><box>(1,2),(3,4)</box>, <ref>the cup</ref><box>(0,0),(9,9)</box>."
    )
    expected = [CUP, Box("a dog", 1, 2, 3, 4), Box("the cup", 0, 0, 9, 9)]
    assert parse_boxes(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "<box>(1, 2), (3, 4)</box>",
        "<ref>far away</ref> it is at <box>(1, 2), (3, 4)</box>",
        "<ref>never closed<box>(1, 2), (3, 4)</box>",
        "</ref><box>(1, 2), (3, 4)</box>",
    ],
)
def test_a_box_without_a_reference_right_before_it_has_none(text: str) -> None:
    assert parse_boxes(text) == [Box(None, 1, 2, 3, 4)]


def test_only_the_first_of_two_boxes_after_a_reference_carries_it() -> None:
    text = "<ref>cups</ref><box>(1, 2), (3, 4)</box><box>(5, 6), (7, 8)</box>"
    assert parse_boxes(text) == [Box("cups", 1, 2, 3, 4), Box(None, 5, 6, 7, 8)]


@pytest.mark.parametrize(
    "box",
    [
        "(1,2),(3,4)",
        " ( 1 , 2 ) , ( 3 , 4 ) ",
        "\n(1,\n2),\n(3, 4)\n",
        "(1.0, 2.000), (3, 4.0)",
    ],
)
def test_space_newlines_and_decimals_do_not_matter(box: str) -> None:
    assert parse_boxes(f"<ref>x</ref>\n<box>{box}</box>") == [Box("x", 1, 2, 3, 4)]


def test_fractions_and_negative_numbers_are_passed_on() -> None:
    assert parse_boxes("<box>(-1.5, 0.25), (999.75, -0)</box>") == [
        Box(None, -1.5, 0.25, 999.75, 0.0)
    ]


def test_a_reference_may_hold_any_text_and_newlines() -> None:
    text = "<ref>the 茶杯,\n(left) > right</ref><box>(1, 2), (3, 4)</box>"
    assert parse_boxes(text) == [Box("the 茶杯,\n(left) > right", 1, 2, 3, 4)]


@pytest.mark.parametrize(
    "box",
    [
        "(1, 2), (3, 4",
        "(1, 2)",
        "(1, 2), (3)",
        "(1, 2), (3, 4), (5, 6)",
        "1, 2, 3, 4",
        "(a, b), (c, d)",
        "(1., 2), (3, 4)",
        "(1 2), (3 4)",
        "(1, 2) (3, 4)",
        "(nan, inf), (3, 4)",
        "",
    ],
)
def test_a_malformed_box_is_ignored_and_the_next_still_found(box: str) -> None:
    text = f"<ref>bad</ref><box>{box}</box> then <ref>good</ref><box>(1, 2), (3, 4)</box>"
    assert parse_boxes(text) == [Box("good", 1, 2, 3, 4)]


def test_a_box_that_was_cut_off_is_ignored() -> None:
    whole = "<ref>the cup</ref><box>(12, 34), (567, 890)</box>"
    assert [len(parse_boxes(whole[:end])) for end in range(len(whole) + 1)] == [0] * len(whole) + [
        1
    ]


def test_boxes_are_finite_so_that_an_answer_is_valid_json() -> None:
    """A model caught in a loop may write digits without end; float() makes infinity of them."""
    boxes = parse_boxes(f"<box>({'9' * 400}, 0), (1, 1)</box>")
    json.dumps([asdict(box) for box in boxes], allow_nan=False)
