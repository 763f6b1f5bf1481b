"""Answers of every kind, right and wrong ones, and the agreement with TRL's `accuracy_reward`."""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from trl.rewards import accuracy_reward

from oblr_trl.data.answers import as_latex, check_answer_pattern, extract_answer
from oblr_trl.evaluation.rewards import grade, math_accuracy, parse_reference

# Reference answer, completions that give it, completions that do not.
CASES = [
    ("42", [r"\boxed{42}", "The final answer is $42$. I hope it is correct."], [r"\boxed{43}", "I do not know.", ""]),
    ("42", [], [r"\boxed{41}, but perhaps 42", r"\boxed{42", r"\boxed{}"]),  # the box counts; cut off; empty
    ("-3", [r"so $x = \boxed{-3}$."], []),
    ("27", [r"\boxed{27.0}"], []),
    ("5", [r"\boxed{5\text{ cm}}"], []),
    ("12", [r"\boxed{\$12}"], []),
    (r"\$12", [r"\boxed{12}"], []),
    (r"\frac{1}{2}", [r"\boxed{\frac{2}{4}}", r"\boxed{0.5}"], []),
    (r"\frac12", [r"\boxed{1/2}"], []),
    (r"\frac{1}{3}", [], [r"\boxed{0.333}"]),
    (r"1\frac{1}{2}", [r"\boxed{1.5}"], []),
    ("[0,1)", [r"\boxed{[0,1)}"], [r"\boxed{[0,1]}"]),
    (r"(-\infty, 3) \cup (5, \infty)", [r"\boxed{(5,\infty) \cup (-\infty,3)}"], []),
    (r"x \in [-2,7]", [r"\boxed{[-2,7]}"], []),
    ("x > 3", [r"\boxed{(3,\infty)}"], []),
    (r"\{1,2,3\}", [r"\boxed{\{3,2,1\}}"], [r"\boxed{\{1,2\}}"]),
    ("1, -2", [r"\boxed{-2 \text{ and } 1}", r"\boxed{x=1, x=-2}"], []),
    ("1, 3", [r"\boxed{1}, \boxed{3}"], [r"\boxed{1}"]),  # adjacent boxes are the parts of one answer
    ("$1,3$", [r"\boxed{3, 1}"], []),
    ("(3,4)", [], [r"\boxed{(4,3)}"]),
    (r"\left( 3, \frac{\pi}{2} \right)", [r"\boxed{(3, \pi/2)}"], []),
    (r"5 \text{ cm}", [r"\boxed{5}"], []),
    (r"90^\circ", [r"\boxed{90}"], []),
    (r"50\%", [r"\boxed{50\%}", r"\boxed{0.5}", r"\boxed{50}"], []),
    ("1,234,567", [r"\boxed{1234567}"], []),
    ("1234567", [r"\boxed{1,234,567}"], []),
    ("1,234", [], [r"\boxed{1.234}"]),
    (r"3,\!750", [r"\boxed{3750}"], []),
    (
        r"2\sqrt{3}",
        [r"\boxed{\sqrt{12}}"],
        [r"\boxed{2}"],
    ),  # 2: what a reference without dollar signs would be read as
    ("3^{20}", [r"\boxed{3486784401}"], []),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", [r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}"], []),
    ("p - q", [r"\boxed{-q + p}"], []),
    ("y = 2x + 3", [r"\boxed{y = 3 + 2x}"], [r"\boxed{2}"]),
    ("x = 5", [r"\boxed{5}"], []),
    (r"\text{Evelyn}", [r"\boxed{\text{Evelyn}}"], [r"\boxed{\text{Briana}}"]),
    (r"\text{(C)}", [r"\boxed{C}"], [r"\boxed{B}"]),
]
WITHOUT_LATEX = [
    "The answer is 42.",
    "#### 42",
    "Answer: 42",
    "**42**",
    "It costs $42.",
    "41 and one more makes 42 apples",
]


@pytest.mark.parametrize(("answer", "right", "wrong"), CASES)
def test_right_answers_count_and_wrong_ones_do_not(answer, right, wrong):
    grades = grade(answer, [*right, *wrong])
    assert grades == [True] * len(right) + [False] * len(wrong)


def test_an_answer_without_latex_counts():
    assert grade("42", WITHOUT_LATEX) == [True] * len(WITHOUT_LATEX)


def test_two_answers_are_not_one_right_one():
    assert grade("42", [r"\boxed{41}, no, \boxed{42}"]) == [False]


def test_grades_of_answers_in_latex_are_those_of_accuracy_reward():
    pairs = [(answer, text) for answer, right, wrong in CASES for text in right + wrong]
    rewards = accuracy_reward(
        [[{"role": "assistant", "content": text}] for _, text in pairs], [as_latex(answer) for answer, _ in pairs]
    )

    assert None not in rewards
    grades = [grade(answer, [text])[0] for answer, text in pairs]
    assert [bool(reward) for reward in rewards] == grades


def test_accuracy_reward_misreads_an_answer_without_dollar_signs():
    # Why `answer_template: "${answer}$"` exists: here 2 is rewarded for 2 sqrt(3).
    completion = [[{"role": "assistant", "content": r"\boxed{2}"}]]

    assert accuracy_reward(completion, [r"2\sqrt{3}"]) == [1.0]
    assert accuracy_reward(completion, [as_latex(r"2\sqrt{3}")]) == [0.0]


@pytest.mark.parametrize("answer", ["", "???", "$$", r"\boxed{}"])
def test_a_reference_that_math_verify_does_not_understand_is_empty(answer):
    assert not parse_reference(answer)


def test_the_reward_is_the_grade_of_the_evaluation():
    metrics = {}
    rewards = math_accuracy(
        [r"\boxed{\sqrt{12}}", [{"role": "assistant", "content": r"\boxed{2}"}], "so 7", "7"],
        [r"2\sqrt{3}", r"2\sqrt{3}", "7", "???"],
        log_metric=metrics.__setitem__,
    )

    assert rewards == [1.0, 0.0, 1.0, None]
    assert metrics == {"accuracy": pytest.approx(2 / 3)}  # of those with a solution


def test_the_reward_can_be_computed_outside_of_the_main_thread():
    with ThreadPoolExecutor(1) as pool:  # where math-verify's own timeouts do not work
        assert pool.submit(math_accuracy, [r"\boxed{1/2}"], ["0.5"]).result() == [1.0]


@pytest.mark.parametrize(
    ("pattern", "cells"),
    [
        ("#### (.+)", [("5*5=<<5*5=25>>25\n#### 1,025", "1,025"), ("#### 1\n#### 2", "2"), ("no mark", None)]),
        (None, [("  42 ", "42"), (27.0, "27"), (0.25, "0.25"), (7, "7"), (["$1$", "3"], "1, 3")]),
        (None, [(["$\\frac{1}{2}$"], "$\\frac{1}{2}$")]),
        (None, [([], None), (None, None), ([None], None), ("", None), (True, None)]),
    ],
)
def test_the_answer_is_taken_out_of_a_cell(pattern, cells):
    assert [extract_answer(cell, pattern) for cell, _ in cells] == [answer for _, answer in cells]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("(", "not a regular expression"), ("#### .+", "has 0 groups"), ("(a)(b)", "has 2 groups: put the answer")],
)
def test_a_pattern_without_one_group_is_refused(pattern, message):
    with pytest.raises(ValueError, match=f"`answer_pattern` is {re.escape(repr(pattern))}.*{message}"):
        check_answer_pattern(pattern, field_name="answer_pattern")


@pytest.mark.parametrize("answer", ["$1$ or $2$", r"\boxed{3}", r"\(4\)", r"\[5\]"])
def test_latex_that_is_marked_as_such_stays_as_it_is(answer):
    assert as_latex(answer) == answer
