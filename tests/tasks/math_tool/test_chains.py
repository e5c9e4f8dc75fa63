"""Steps, their chains, and the mistakes about them."""

from __future__ import annotations

from lightningrl.tasks.math_tool.chains import Step, mistakes, solved, steps_of

STEPS = (Step("48", "/", "2"), Step("48", "-", 0))


def test_steps_are_solved_one_after_another() -> None:
    assert solved(STEPS) == (("48/2", "24"), ("48-24", "24"))
    assert solved([Step("3", "-", "8"), Step(0, "-", 0)]) == (("3-8", "-5"), ("-5--5", "0"))
    assert solved(()) == ()


def test_an_error_on_the_way_goes_on() -> None:
    assert [value for _, value in solved([Step("1", "/", "0"), Step(0, "+", "1")])] == [
        "error: division by zero",
        "error: 'e' is not part of a number or an operator",
    ]


def test_steps_are_read_from_a_chain() -> None:
    assert steps_of((("48/2", "24"), ("48-24", "24"), ("24*24.0", "576"))) == (*STEPS, Step(1, "*", 1))
    assert steps_of((("( 7.0 - 2.0 )", "5"),)) == (Step("7.0", "-", "2.0"),)
    assert steps_of((("1+2+3", "6"),)) is None and steps_of((("5", "5"),)) is None
    assert steps_of(()) == ()


def test_every_mistake_has_its_kind() -> None:
    found = {kind: solved(steps) for kind, steps in mistakes(STEPS)}
    assert found == {
        "operation_1": (("48*2", "96"), ("48-96", "-48")),
        "swapped_1": (("2/48", "0.0416667"), ("48-0.0416667", "47.958333")),
        "number_1": (("48/48", "1"), ("48-1", "47")),
        "left_out_1": (("48-48", "0"),),
        "operation_2": (("48/2", "24"), ("48+24", "72")),
        "swapped_2": (("48/2", "24"), ("24-48", "-24")),
        "left_out_2": (("48/2", "24"),),
    }


def test_leaving_out_a_step_moves_what_refers_to_later_ones() -> None:
    steps = (Step("2", "*", "3"), Step("4", "*", "5"), Step(0, "+", 1), Step(2, "-", "6"))
    without = dict(mistakes(steps))
    assert without["left_out_1"] == (Step("4", "*", "5"), Step("2", "+", 0), Step(1, "-", "6"))
    assert without["left_out_2"] == (Step("2", "*", "3"), Step(0, "+", "4"), Step(1, "-", "6"))
    assert without["left_out_3"] == (Step("2", "*", "3"), Step("4", "*", "5"), Step(0, "-", "6"))


def test_a_single_step_is_not_left_out() -> None:
    assert [kind for kind, _ in mistakes([Step("5", "+", "6")])] == ["operation_1", "number_1"]
