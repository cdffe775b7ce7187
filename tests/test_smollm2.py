"""What `tools/smollm2.py eight-bits` makes of answers, without the model."""

import numpy as np
import pytest

from tools.smollm2 import (
    ASKED,
    REFERENCE,
    STYLES,
    TABLE_HEAD,
    Answers,
    Difference,
    Prompts,
    first_difference,
    notes_of,
    table_row,
)

END = 9
PROMPTS = Prompts(np.array([[1, 2, 0], [3, 4, 5]]), np.array([2, 3]))
NAN = np.nan


def test_answers_stand_right_behind_their_prompts() -> None:
    rows, is_answer = PROMPTS.answered(np.array([[6, END, END], [6, 7, 8]]), (END,))
    np.testing.assert_array_equal(rows, [[1, 2, 6, END, END, 0], [3, 4, 5, 6, 7, 8]])
    np.testing.assert_array_equal(is_answer, [[0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1]])


@pytest.mark.parametrize("ends", [(END,), (0, END)])
def test_an_answer_may_be_its_end_alone(ends: tuple[int, ...]) -> None:
    _, is_answer = PROMPTS.answered(np.array([[END, END], [END, END]]), ends)
    np.testing.assert_array_equal(is_answer, [[0, 0, 1, 0, 0], [0, 0, 0, 1, 0]])


@pytest.mark.parametrize(
    "row, want", [([1, 2, 3], None), ([0, 2, 3], 0), ([1, 2, 0], 2), ([1, 0, 0], 1)]
)
def test_the_first_difference_of_rows(row: list[int], want: int | None) -> None:
    assert first_difference(np.array(row), np.array([1, 2, 3])) == want


REFERENCE_ANSWERS = Answers(
    None,
    np.array([[6, END, END], [6, 7, 8]]),
    np.array([[-0.25, -0.5, NAN], [-0.25, -0.5, -1.0]]),
    np.array([[4.0, 3.0, NAN], [4.0, 3.0, 0.125]]),
)


def test_a_difference_has_the_lead_that_was_lost() -> None:
    found = Answers(
        0.01,
        np.array([[6, END, END], [6, 7, 5]]),
        np.array([[-0.25, -0.75, NAN], [-0.25, -0.5, -1.5]]),
        np.array([[4.0, 3.0, NAN], [4.0, 3.0, -0.25]]),
    )
    assert Difference.of(found, REFERENCE_ANSWERS) == Difference([None, 2], [None, 0.125], 0.5)
    equal = Difference.of(REFERENCE_ANSWERS, REFERENCE_ANSWERS)
    assert equal == Difference([None, None], [None, None], 0.0)


def test_a_row_says_how_many_texts_are_equal_and_counts_tokens_from_one() -> None:
    difference = Difference([None, 2, 0], [None, 0.125, 1.5], 0.5)
    row = table_row("pirate", "int8", 0.01234, difference)
    assert row == "| pirate, rank 8 | int8 | 0.0123 | 1 of 3 | 1 | 0.500 |"
    assert row.count("|") == TABLE_HEAD[0].count("|") == TABLE_HEAD[1].count("|")
    notes = notes_of("pirate", "int8", difference)
    assert len(notes) == 2
    assert all(part in notes[0] for part in ("pirate, int8", ASKED[1], "token 3", "0.125"))
    assert all(part in notes[1] for part in (REFERENCE, ASKED[2], "token 1 ", "1.500"))


def test_a_row_of_equal_answers_has_no_first_token() -> None:
    row = table_row("robot", "float32", None, Difference([None], [None], 0.0))
    assert row == "| robot, rank 160 | float32 | - | 1 of 1 | - | 0.000 |"


def test_each_adapter_is_asked_twenty_times() -> None:
    assert len(set(ASKED)) == len(ASKED) == 20
    assert [style.rank for style in STYLES.values()] == [8, 16, 64, 160]
