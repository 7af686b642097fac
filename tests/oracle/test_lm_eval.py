"""Minerva Math as lm-eval has it: prompts, outputs and scores, from its own code."""

from __future__ import annotations

from typing import Any

import pytest

from salve_lm.tasks.generation import Generation
from salve_lm.tasks.minerva import MinervaPrompt, normalise, stated_answer
from salve_lm.tasks.problems import MathProblems, Problem, ProblemSource, boxed_answer
from tests.tasks.language_tiny import byte_tokenizer, rows_of, tiny_model

pytest.importorskip("lm_eval", reason="lm-eval is in the extra `eval`")


def problem(answer: str, sample: int = 0, subject: str = "algebra") -> Problem:
    text = f"What is problem {sample}?"
    return Problem(sample, subject, text, f"Clearly it is $\\boxed{{{answer}}}$.", answer)


def final(answer: str) -> str:
    return f"Some steps.\nFinal Answer: The final answer is ${answer}$. I hope it is correct."


OUTPUTS = [
    # gold, output
    ("39", final("39")),
    ("39", r"Thus the answer is $\boxed{39}$."),
    ("39", r"Thus the answer is $\boxed{39}$." + "\n" + final("39")),
    ("39", final("40")),
    ("39", "thirty-nine"),
    ("39", ""),
    ("39", "Final Answer: The final answer is 39. I hope it is correct."),
    ("39", "Final Answer: The final answer is $39$."),
    ("39", "Final Answer: The final answer is $39$"),
    ("39", "Final Answer: The final answer is $39$! I hope it is correct?"),
    ("39", final("38") + "\n" + final("39")),
    ("39", final("x = 39")),
    ("39", final(r"39\text{ units}")),
    ("39", final(r"39 \text{ cm}^2")),
    ("39", final("39 dollars")),
    ("39", final(r"\$39")),
    ("39", final(r"39^\circ")),
    ("39", final("39.0")),
    ("39", final("30 + 9")),
    (r"\frac{1}{2}", final(r"\frac12")),
    (r"\frac{1}{2}", final(r"\dfrac{1}{2}")),
    (r"\frac{1}{2}", final("1/2")),
    (r"\frac{1}{2}", final("0.5")),
    (r"\frac{1}{2}", final(r"\frac{2}{4}")),
    (r"\sqrt{2}", final(r"\sqrt2")),
    (r"\sqrt[3]{2}", final(r"\sqrt[3]2")),
    (r"2\sqrt{3}", final(r"\sqrt{12}")),
    ("1,000", final("1000")),
    ("1,000", final("1{,}000")),
    ("0,1", final("0,1")),
    ("0,1", final("01")),
    (r"\left(3, \frac{\pi}{2}\right)", final(r"\left( 3, \frac{\pi}{2} \right)")),
    ("[2,5)", final("[2, 5)")),
    (r"(-\infty, 3]", final(r"(-\infty,3]")),
    (r"\text{Monday}", final("Monday")),
    (r"\text{(C)}", final(r"\text{C}")),
    ("x^2+2x+1", final("(x+1)^2")),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", final(r"\begin{pmatrix}1\\2\end{pmatrix}")),
    (r"10\%", final("10")),
    ("5", final(r"\frac{5}")),
    ("5", final("{")),
    ("5", final(r"\left")),
    ("2 \\pi", final(r"2\pi cm")),
    ("7", final(r"\boxed{7}")),
    ("12:30", final("12:30")),
]


@pytest.mark.parametrize(("gold", "output"), OUTPUTS)
def test_scores_equal_lm_evals(gold: str, output: str) -> None:
    from lm_eval.tasks.minerva_math import utils

    asked = problem(gold)
    boxed = utils.remove_boxed(utils.last_boxed_only_string(asked.solution))
    doc = {"solution": asked.solution, "answer": utils.normalize_final_answer(boxed)}
    scores = MinervaPrompt().score(asked, output)
    theirs = utils.process_results(doc, [output])
    assert {k: int(scores[k]) for k in theirs} == theirs
    stated = stated_answer(output)
    assert (stated if stated is not None else "[invalidanswer]") == utils.get_unnormalized_answer(
        output
    )


def test_a_boxed_answer_without_the_sentence() -> None:
    """METHODS 7: 0 on exact_match, 1 on math_verify."""
    scores = MinervaPrompt().score(problem("39"), r"So it is $\boxed{39}$.")
    assert (scores["exact_match"], scores["math_verify"], scores["extracted"]) == (
        False, True, None,
    )  # fmt: skip


class Listed(ProblemSource):
    def __init__(self, listed: list[Problem]) -> None:
        self.listed = listed

    def problems(self) -> list[Problem]:
        return self.listed


@pytest.mark.parametrize("family", ["gemma3"])
def test_the_same_model_through_lm_eval(family: str) -> None:
    """Same prompts, outputs and scores of a random model, with lm-eval's own loop."""
    from salve_lm.tasks.lm_eval import run_lm_eval

    listed = [
        problem(str(i), sample=3 * i, subject=("algebra", "number_theory")[i % 2]) for i in range(5)
    ]
    model, tokenizer = tiny_model(family, context=4096), byte_tokenizer()
    theirs = run_lm_eval(model, tokenizer, listed, max_new_tokens=12, batch_size=2)
    ours = rows_of(Generation(Listed(listed), max_new_tokens=12, rows=3), model, tokenizer)
    shared = ("sample", "subject", "problem_id", "answer", "output", "exact_match", "math_verify")
    assert [{k: r[k] for k in shared} for r in ours] == [{k: r[k] for k in shared} for r in theirs]
    assert [r["prompt"] for r in theirs] == [MinervaPrompt().text(p) for p in listed]
    again = [MinervaPrompt().score(p, r["output"]) for p, r in zip(listed, theirs, strict=True)]
    assert [(s["exact_match"], s["math_verify"]) for s in again] == [
        (r["exact_match"], r["math_verify"]) for r in theirs
    ]


def test_off_the_main_thread() -> None:
    """math-verify's and sympy's time limits need signals, which other threads cannot set."""
    import threading

    found: list[Any] = []

    def score() -> None:
        for gold, output in OUTPUTS[:4]:
            found.append(MinervaPrompt().score(problem(gold), output))

    thread = threading.Thread(target=score)
    thread.start()
    thread.join()
    assert found == [MinervaPrompt().score(problem(g), o) for g, o in OUTPUTS[:4]]


@pytest.mark.shared_data
@pytest.mark.parametrize("split", ["train", "test"])
def test_gold_answers_of_math(shared_data: Any, split: Any) -> None:
    """Every gold answer and its normal form."""
    from lm_eval.tasks.minerva_math import utils

    source = MathProblems(str(shared_data / "math"), split, unboxed="skip")
    for p in source.problems():
        gold = utils.remove_boxed(utils.last_boxed_only_string(p.solution))
        assert boxed_answer(p.solution) == p.answer == gold
        assert normalise(gold) == utils.normalize_final_answer(gold)
