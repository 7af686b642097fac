"""The Minerva Math prompt, and the answer that an output states.

Prompt, answer sentence and normalisation are those of Lewkowycz et al. 2022, "Solving Quantitative
Reasoning Problems with Language Models" (arXiv 2206.14858), appendix D. The four worked examples
are rows of Hendrycks MATH (MIT). Behaviour follows lm-eval's `minerva_math` version 3.1, against
which `tests/oracle/test_lm_eval.py` checks it: word boundaries around units, indexed roots, and
commas of thousands are lm-eval's corrections of the paper.
"""

from __future__ import annotations

import re

from salve_lm.errors import BadConfig
from salve_lm.tasks.problems import Problem
from salve_lm.tasks.prompts import Prompt, Scores
from salve_lm.tasks.scoring import equivalent, math_verified

SHOTS: tuple[tuple[str, str], ...] = (
    (
        r"Find the domain of the expression  $\frac{\sqrt{x-2}}{\sqrt{5-x}}$.",
        r"The expressions inside each square root must be non-negative. Therefore, $x-2 \ge 0$, so "
        r"$x\ge2$, and $5 - x \ge 0$, so $x \le 5$. Also, the denominator cannot be equal to zero, "
        r"so $5-x>0$, which gives $x<5$. Therefore, the domain of the expression is "
        r"$\boxed{[2,5)}$."
        "\n"
        r"Final Answer: The final answer is $[2,5)$. I hope it is correct.",
    ),
    (
        r"If $\det \mathbf{A} = 2$ and $\det \mathbf{B} = 12,$ then find "
        r"$\det (\mathbf{A} \mathbf{B}).$",
        r"We have that $\det (\mathbf{A} \mathbf{B}) = (\det \mathbf{A})(\det \mathbf{B}) = "
        r"(2)(12) = \boxed{24}.$"
        "\n"
        r"Final Answer: The final answer is $24$. I hope it is correct.",
    ),
    (
        "Terrell usually lifts two 20-pound weights 12 times. If he uses two 15-pound weights "
        "instead, how many times must Terrell lift them in order to lift the same total weight?",
        r"If Terrell lifts two 20-pound weights 12 times, he lifts a total of "
        r"$2\cdot 12\cdot20=480$ pounds of weight.  If he lifts two 15-pound weights instead for "
        r"$n$ times, he will lift a total of $2\cdot15\cdot n=30n$ pounds of weight.  Equating "
        r"this to 480 pounds, we can solve for $n$:"
        "\n"
        r"\begin{align*}"
        "\n"
        r"30n&=480\\"
        "\n"
        r"\Rightarrow\qquad n&=480/30=\boxed{16}"
        "\n"
        r"\end{align*}"
        "\n"
        r"Final Answer: The final answer is $16$. I hope it is correct.",
    ),
    (
        "If the system of equations\n\n"
        r"\begin{align*}"
        "\n"
        r"6x-4y&=a,\\"
        "\n"
        r"6y-9x &=b."
        "\n"
        r"\end{align*}has a solution $(x, y)$ where $x$ and $y$ are both nonzero,"
        "\n"
        r"find $\frac{a}{b},$ assuming $b$ is nonzero.",
        r"If we multiply the first equation by $-\frac{3}{2}$, we obtain"
        "\n\n"
        r"$$6y-9x=-\frac{3}{2}a.$$Since we also know that $6y-9x=b$, we have"
        "\n\n"
        r"$$-\frac{3}{2}a=b\Rightarrow\frac{a}{b}=\boxed{-\frac{2}{3}}.$$"
        "\n"
        r"Final Answer: The final answer is $-\frac{2}{3}$. I hope it is correct.",
    ),
)
_ENDING = "I hope it is correct."
# The dots stand for any character, as in lm-eval: an output that ends "...is $5$! I hope it is
# correct?" counts there too.
_STATED = re.compile("Final Answer: The final answer is(.*?). I hope it is correct.")

# Appendix D's tables, in its order, which matters.
_REPLACED = (
    ("an ", ""), ("a ", ""), (".$", "$"), (r"\$", ""), (r"\ ", ""), (" ", ""), ("mbox", "text"),
    (r",\text{and}", ","), (r"\text{and}", ","), (r"\text{m}", r"\text{}"),
)  # fmt: skip
_DROPPED = (
    "square", "ways", "integers", "dollars", "mph", "inches", "ft", "hours", "km", "units",
    r"\ldots", "sue", "points", "feet", "minutes", "digits", "cents", "degrees", "cm", "gm",
    "pounds", "meters", "meals", "edges", "students", "childrentickets", "multiples", r"\text{s}",
    r"\text{.}", "\\text{\ns}", r"\text{}^2", r"\text{}^3", "\\text{\n}", r"\text{}",
    r"\mathrm{th}", r"^\circ", r"^{\circ}", r"\;", r",\!", "{,}", '"', r"\dots",
)  # fmt: skip
_COMMAND = re.compile(r"(\\[a-zA-Z]+)")
_UNWRAPPED = (
    (re.compile(r"(.*?)\$(.*?)\$(.*)"), r"$\2$"),
    (re.compile(r"\\text\{(.*?)\}"), r"\1"),
    (re.compile(r"\\textbf\{(.*?)\}"), r"\1"),
    (re.compile(r"\\overline\{(.*?)\}"), r"\1"),
    (re.compile(r"\\boxed\{(.*)\}"), r"\1"),
    # \frac12 -> \frac{1}{2}, \sqrt[3]8 -> \sqrt[3]{8}, \sqrt2 -> \sqrt{2}
    (re.compile(r"frac([^{])(.)"), r"frac{\1}{\2}"),
    (re.compile(r"sqrt(\[[^\]]*\])(\w)"), r"sqrt\1{\2}"),
    (re.compile(r"sqrt([^{\[])"), r"sqrt{\1}"),
)
_THOUSANDS = re.compile(r"-?\d{1,3}(,\d{3})+")


class MinervaPrompt(Prompt):
    """Minerva Math: four fixed worked examples, then the problem; stop at `Problem:`.

    Two scores, always both: `exact_match` of the answer in the sentence "Final Answer: The final
    answer is ... I hope it is correct.", and `math_verify` of the whole output. A bare
    `\\boxed{39}` scores 0 on the first and 1 on the second, so a gain on the first alone may be
    formatting.

    Args:
        shots: How many of the four examples come first. Fewer than 4 is no longer the published
            benchmark; for models whose context is short.
    """

    metrics = ("exact_match", "math_verify")

    def __init__(self, shots: int = 4) -> None:
        if not 0 <= shots <= len(SHOTS):
            raise BadConfig(f"shots is {shots}; there are 0 to {len(SHOTS)}.")
        self.shots = shots
        self.stop = ["Problem:"]

    def text(self, problem: Problem) -> str:
        """The examples and the problem."""
        solved = [f"{_question(q)} {solution}" for q, solution in SHOTS[: self.shots]]
        return "\n\n".join([*solved, _question(problem.problem)])

    def score(self, problem: Problem, output: str) -> Scores:
        """The stated answer, normalised, and both scores."""
        stated = stated_answer(output)
        extracted = None if stated is None else normalise(stated)
        gold = normalise(problem.answer)
        return {
            "extracted": extracted,
            "exact_match": extracted is not None and equivalent(extracted, gold),
            "math_verify": math_verified(problem, output),
        }


def stated_answer(output: str) -> str | None:
    """The answer in the literal sentence that the examples end with; None without one."""
    # the ending is appended because an output may be cut just before it
    match = _STATED.search(output + _ENDING)
    return match.group(1).strip() if match else None


def normalise(answer: str) -> str:
    """An answer without units, spaces, text and shorthand LaTeX (appendix D, as lm-eval mends it).

    >>> normalise(r"x=\\frac12\\text{ units}")
    '\\\\frac{1}{2}'
    """
    answer = answer.rpartition("=")[2]
    words = [w for w in _DROPPED if w.isalpha()]
    # whole words while spaces still delimit them, but never the name of a LaTeX command
    for word in words:
        answer = re.sub(rf"(?<!\\)\b{word}\b", "", answer)
    for old, new in _REPLACED:
        answer = answer.replace(old, new)
    for dropped in _DROPPED:
        if dropped.isalpha():
            parts = _COMMAND.split(answer)  # commands stand at the odd places
            parts[::2] = [part.replace(dropped, "") for part in parts[::2]]
            answer = "".join(parts)
        else:
            answer = answer.replace(dropped, "")
    for pattern, kept in _UNWRAPPED:
        answer = pattern.sub(kept, answer)
    answer = answer.replace("$", "")
    return answer.replace(",", "") if _THOUSANDS.fullmatch(answer) else answer


def _question(problem: str) -> str:
    return f"Problem:\n{problem}\n\nSolution:"
