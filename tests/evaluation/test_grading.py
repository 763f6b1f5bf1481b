"""Answers of every kind, right and wrong ones, and the agreement with TRL's `accuracy_reward`."""

import re

import pytest
from trl.rewards import accuracy_reward

from oblr_trl.data.answers import as_latex, compile_answer_pattern, extract_answer
from oblr_trl.evaluation.grading import grade, parse_reference

RIGHT = [
    ("42", r"\boxed{42}"),
    ("42", "The final answer is $42$. I hope it is correct."),
    ("-3", r"so $x = \boxed{-3}$."),
    ("27", r"\boxed{27.0}"),
    (r"\frac{1}{2}", r"\boxed{\frac{2}{4}}"),
    (r"\frac{1}{2}", r"\boxed{0.5}"),
    (r"\frac12", r"\boxed{1/2}"),
    (r"1\frac{1}{2}", r"\boxed{1.5}"),
    ("[0,1)", r"\boxed{[0,1)}"),
    (r"(-\infty, 3) \cup (5, \infty)", r"\boxed{(5,\infty) \cup (-\infty,3)}"),
    (r"x \in [-2,7]", r"\boxed{[-2,7]}"),
    ("x > 3", r"\boxed{(3,\infty)}"),
    (r"\{1,2,3\}", r"\boxed{\{3,2,1\}}"),
    ("1, -2", r"\boxed{-2 \text{ and } 1}"),
    ("1, -2", r"\boxed{x=1, x=-2}"),
    ("1, 3", r"\boxed{1}, \boxed{3}"),  # boxes beside one another are the parts of one answer
    (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(3, \pi/2)}"),
    (r"5 \text{ cm}", r"\boxed{5}"),
    ("5", r"\boxed{5\text{ cm}}"),
    (r"90^\circ", r"\boxed{90}"),
    ("12", r"\boxed{\$12}"),
    (r"\$12", r"\boxed{12}"),
    (r"50\%", r"\boxed{50\%}"),
    (r"50\%", r"\boxed{0.5}"),
    (r"50\%", r"\boxed{50}"),
    ("1,234,567", r"\boxed{1234567}"),
    ("1234567", r"\boxed{1,234,567}"),
    (r"3,\!750", r"\boxed{3750}"),
    (r"2\sqrt{3}", r"\boxed{\sqrt{12}}"),
    ("3^{20}", r"\boxed{3486784401}"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}"),
    ("p - q", r"\boxed{-q + p}"),
    ("y = 2x + 3", r"\boxed{y = 3 + 2x}"),
    ("x = 5", r"\boxed{5}"),
    (r"\text{Evelyn}", r"\boxed{\text{Evelyn}}"),
    (r"\text{(C)}", r"\boxed{C}"),
    ("$1,3$", r"\boxed{3, 1}"),
]
WRONG = [
    ("42", r"\boxed{43}"),
    ("42", r"\boxed{41}, but perhaps 42"),  # the box counts
    ("42", r"\boxed{42"),  # cut off
    ("42", r"\boxed{}"),
    ("42", "I do not know."),
    ("42", ""),
    (r"\frac{1}{3}", r"\boxed{0.333}"),
    (r"2\sqrt{3}", r"\boxed{2}"),  # what a reference without dollar signs would be read as
    ("y = 2x + 3", r"\boxed{2}"),
    ("[0,1)", r"\boxed{[0,1]}"),
    ("(3,4)", r"\boxed{(4,3)}"),
    (r"\{1,2,3\}", r"\boxed{\{1,2\}}"),
    ("1, 3", r"\boxed{1}"),
    ("1,234", r"\boxed{1.234}"),
    (r"\text{Evelyn}", r"\boxed{\text{Briana}}"),
    (r"\text{(C)}", r"\boxed{B}"),
]
WITHOUT_LATEX = [
    "The answer is 42.",
    "#### 42",
    "Answer: 42",
    "**42**",
    "It costs $42.",
    "41 and one more makes 42 apples",
]


@pytest.mark.parametrize("answer_format", ["any", "latex"])
@pytest.mark.parametrize(("answer", "completion"), RIGHT)
def test_a_right_answer_counts(answer, completion, answer_format):
    assert grade(parse_reference(answer), [completion], answer_format=answer_format) == [True]


@pytest.mark.parametrize("answer_format", ["any", "latex"])
@pytest.mark.parametrize(("answer", "completion"), WRONG)
def test_a_wrong_answer_does_not_count(answer, completion, answer_format):
    assert grade(parse_reference(answer), [completion], answer_format=answer_format) == [False]


def test_an_answer_without_latex_counts_unless_latex_is_asked_for():
    reference = parse_reference("42")

    assert grade(reference, WITHOUT_LATEX) == [True] * len(WITHOUT_LATEX)
    assert grade(reference, WITHOUT_LATEX, answer_format="latex") == [False] * len(WITHOUT_LATEX)


def test_two_answers_are_not_one_right_one():
    assert grade(parse_reference("42"), [r"\boxed{41}, no, \boxed{42}"]) == [False]


@pytest.mark.parametrize("cases", [RIGHT, WRONG, [("42", text) for text in WITHOUT_LATEX]])
def test_latex_grades_are_those_of_accuracy_reward(cases):
    answers, completions = zip(*cases, strict=True)
    rewards = accuracy_reward(
        [[{"role": "assistant", "content": text}] for text in completions], [as_latex(answer) for answer in answers]
    )

    grades = [grade(parse_reference(a), [c], answer_format="latex")[0] for a, c in cases]
    assert [bool(reward) for reward in rewards] == grades
    assert None not in rewards


def test_accuracy_reward_misreads_an_answer_without_dollar_signs():
    # Why `answer_template: "${answer}$"` exists: here 2 is rewarded for 2 sqrt(3).
    completion = [[{"role": "assistant", "content": r"\boxed{2}"}]]

    assert accuracy_reward(completion, [r"2\sqrt{3}"]) == [1.0]
    assert accuracy_reward(completion, [as_latex(r"2\sqrt{3}")]) == [0.0]


@pytest.mark.parametrize("answer", ["", "???", "$$", r"\boxed{}"])
def test_a_reference_that_math_verify_does_not_understand_is_empty(answer):
    assert parse_reference(answer) == []


@pytest.mark.parametrize(
    ("cell", "pattern", "answer"),
    [
        ("5*5=<<5*5=25>>25\n#### 1,025", "#### (.+)", "1,025"),
        ("#### 1\n#### 2", "#### (.+)", "2"),
        ("no mark", "#### (.+)", None),
        ("  42 ", None, "42"),
        (27.0, None, "27"),
        (0.25, None, "0.25"),
        (7, None, "7"),
        (["$\\frac{1}{2}$"], None, "$\\frac{1}{2}$"),
        (["$1$", "3"], None, "1, 3"),
        ([], None, None),
        (None, None, None),
        ([None], None, None),
        ("", None, None),
        (True, None, None),
    ],
)
def test_the_answer_is_taken_out_of_a_cell(cell, pattern, answer):
    assert extract_answer(cell, compile_answer_pattern(pattern, field_name="answer_pattern")) == answer


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("(", "not a regular expression"), ("#### .+", "has 0 groups"), ("(a)(b)", "has 2 groups: put the answer")],
)
def test_a_pattern_without_one_group_is_refused(pattern, message):
    with pytest.raises(ValueError, match=f"`answer_pattern` is {re.escape(repr(pattern))}.*{message}"):
        compile_answer_pattern(pattern, field_name="answer_pattern")


@pytest.mark.parametrize("answer", ["$1$ or $2$", r"\boxed{3}", r"\(4\)", r"\[5\]"])
def test_latex_that_is_marked_as_such_stays_as_it_is(answer):
    assert as_latex(answer) == answer
