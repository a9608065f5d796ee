"""How good the curation rules, gates and checks are on real data, and how fast: `python benchmarks/curation.py`.

Reads shared/data beside the checkout and the hand-checked labels of tests/data; writes benchmarks/results/curate.md.
"""

import collections
import dataclasses
import json
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from random import Random

from jaxdistill.curate.choices import find_choices, open_question
from jaxdistill.curate.contamination import read_evaluation_sets
from jaxdistill.curate.duplicates import Fingerprints, find_duplicates, same_problem
from jaxdistill.curate.formats import read_row, to_problem
from jaxdistill.curate.gates import reformat_gate, translation_gate
from jaxdistill.curate.rules import RULES
from jaxdistill.curate.run import CurateConfig
from jaxdistill.curate.text import MATH, tokens
from jaxdistill.manifest import commit
from jaxdistill.records import Problem, read_json_objects
from jaxdistill.verify import Verifier, VerifierPool, extract_answer

ROOT = Path(__file__).parents[1]
OVERLAP: float = CurateConfig.overlap
LABELS = ROOT / "tests" / "data"


@dataclasses.dataclass(frozen=True)
class Rate:
    """What a detector found, missed, and took for something it is not."""

    found: int
    missed: int
    wrong: int

    @property
    def precision(self) -> float:
        """Share of what was found that is right; 1 where nothing was found."""
        return self.found / (self.found + self.wrong) if self.found + self.wrong else 1.0

    @property
    def recall(self) -> float:
        """Share of what is there that was found; 1 where nothing is there."""
        return self.found / (self.found + self.missed) if self.found + self.missed else 1.0


def rate(pairs: Iterable[tuple[bool, bool]]) -> Rate:
    """Counts pairs of (said by the detector, true by the label)."""
    found = missed = wrong = 0
    for said, true in pairs:
        found += said and true
        missed += true and not said
        wrong += said and not true
    return Rate(found, missed, wrong)


def pool(shared: Path) -> dict[str, Problem]:
    """The raw pool by id."""
    rows = (values for _, values in read_json_objects(shared / "seed_pool/raw_pool.jsonl"))
    return {row["id"]: to_problem(read_row(row), row, row["id"]) for row in rows}


def labels(name: str) -> dict[str, list[str]]:
    """Hand-checked labels by row id."""
    return json.loads((LABELS / name).read_text(encoding="utf-8"))


def rule_rates(problems: Mapping[str, Problem], named: Mapping[str, list[str]]) -> dict[str, Rate]:
    """Precision and recall of each rule on the hand-checked rows, after choices were opened as `curate` does.

    `choices` says whether a row has options at all, `open_question` whether it can do without them; rows without an
    answer say nothing about the last, nor about answers that are no number.
    """
    rows = [(problems[name], set(kinds)) for name, kinds in named.items()]
    opened = [(open_question(problem) or problem, kinds) for problem, kinds in rows]
    answered = [(problem, kinds) for problem, kinds in rows if "no_answer" not in kinds]
    choice = {"convertible_choice", "unconvertible_choice"}

    def by(rule: str, label: str, some: Iterable[tuple[Problem, set[str]]]) -> Rate:
        return rate((RULES[rule](problem) is not None, label in kinds) for problem, kinds in some)

    return {
        "image": by("image", "image", opened),
        "no_answer": by("no_answer", "no_answer", opened),
        "proof": by("proof", "proof", opened),
        "choices": rate((find_choices(problem.problem) is not None, bool(kinds & choice)) for problem, kinds in rows),
        "open_question": rate(
            (open_question(problem) is not None, "convertible_choice" in kinds) for problem, kinds in answered
        ),
        "multiple_choice": by(
            "multiple_choice", "unconvertible_choice", [row for row in opened if "no_answer" not in row[1]]
        ),
        "not_numerical": by("not_numerical", "not_numerical", [row for row in opened if "no_answer" not in row[1]]),
        "incomplete": by("incomplete", "unanswerable", opened),
    }


def cut_statements(problems: Iterable[Problem]) -> Iterator[Problem]:
    """Statements that end in the middle, as a broken export leaves them: cut after 40% and after 70% of the words."""
    for problem in problems:
        words = problem.problem.split(" ")
        for share in (0.4, 0.7):
            if len(words) >= 12:
                yield dataclasses.replace(problem, problem=" ".join(words[: int(share * len(words))]))


EVALUATION_SETS = (
    "math500/math500.jsonl",
    "aime2024/aime2024.jsonl",
    "aime2025/aime2025.jsonl",
    "math2024/math2024.jsonl",
    "extra_math/amc23.jsonl",
    "extra_math/olymmath.jsonl",
    "gsm8k/test.jsonl",
)


def contamination(shared: Path) -> tuple[set[str], set[str]]:
    """Rows of the pool that are marked as contaminating, and those that are found, against all evaluation sets."""
    index = read_evaluation_sets([shared / name for name in EVALUATION_SETS], OVERLAP)
    rows = [values for _, values in read_json_objects(shared / "seed_pool/raw_pool.jsonl")]
    flagged = {row["id"] for row in rows if index.find(tokens(row["problem"]))}
    return {row["id"] for row in rows if row["contaminates"]}, flagged


def typeset_anew(text: str) -> str:
    """The statement as another source would typeset it: other delimiters, fractions, spaces, fonts and symbols."""
    for pattern, other in (
        (r"\\\[(.+?)\\\]", r"$$\1$$"),
        (r"(?<![$\\])\$([^$]+)\$(?!\$)", r"\\( \1 \\)"),
        (r"\\d?frac", r"\\tfrac"),
        (r"\\left|\\right", ""),
        (r"\\leq?(?![a-z])", "≤"),
        (r"\\geq?(?![a-z])", "≥"),
        (r"\\cdot(?![a-z])", r"\\times"),
        (r"\\[cl]?dots", "..."),
        (r"\^\{?\\circ\}?", "°"),
        (r"(?<=[a-z]), (?=[a-z])", ",  "),
        (r"\\(?:text|mathrm)\{([^{}]*)\}", r"\\mbox{\1}"),
        (r"(?<=\d)(?=\d{3}(?!\d))(?<!\d{5})(?<![.\d]\d)", "{,}"),
    ):
        text = re.sub(pattern, other, text, flags=re.DOTALL)
    return " ".join(text.split())


def retypeset(shared: Path) -> tuple[int, int]:
    """How many problems of MATH-500 and AIME 2024 are found once they are typeset anew, and of how many."""
    paths = [shared / name for name in EVALUATION_SETS[:2]]
    index = read_evaluation_sets(paths, OVERLAP)
    texts = [values["problem"] for path in paths for _, values in read_json_objects(path)]
    return sum(index.find(tokens(typeset_anew(text))) is not None for text in texts), len(texts)


def reformat_rates(shared: Path, verifier: Verifier) -> dict[str, tuple[int, int]]:
    """Of how many of the 250 real rewrites the gate refuses those that are corrupt, and keeps those that are good.

    Neither says a person of those whose original has no answer, or one that only a person can compare.
    """
    named, counts = labels("reformat_labels.json"), collections.defaultdict(lambda: [0, 0])
    for _, row in read_json_objects(shared / "reformat/numina_gpt4omini_pairs.jsonl"):
        before = row["solution_before"]
        problem = Problem(id=row["id"], problem=row["question_before"], answer=extract_answer(before), solution=before)
        kept = reformat_gate(problem, row["question"], row["solution"], verifier) is None
        kind = named.get(row["id"], "good")
        counts[kind][0] += kept if kind == "good" else not kept
        counts[kind][1] += 1
    return {kind: (right, count) for kind, (right, count) in counts.items()}


def translations(shared: Path) -> list[tuple[str, str]]:
    """The English and the Chinese statement of each problem of OlymMATH."""
    rows = {row["id"]: row["problem"] for _, row in read_json_objects(shared / "extra_math/olymmath.jsonl")}
    return [(text, rows[name[:-2] + "ZH"]) for name, text in rows.items() if name.endswith("EN")]


def mutations(english: str, chinese: str, random: Random) -> Iterator[tuple[str, str]]:
    """(kind, translation that is no longer one): a digit, a formula, and the language changed."""
    digits = [match.start() for match in re.finditer(r"\d", chinese)]
    if digits:
        at = random.choice(digits)
        yield "number", chinese[:at] + random.choice("0123456789".replace(chinese[at], "")) + chinese[at + 1 :]
    spans = [match for match in MATH.finditer(chinese) if re.search("[a-zA-Z]", match[0])]
    if spans:
        span = random.choice(spans)
        letters = [m.start() for m in re.finditer(r"(?<![\\a-zA-Z{])[a-zA-Z](?![a-zA-Z])", span[0])]
        signs = [m.start() for m in re.finditer(r"[+<>=-]", span[0])]
        changed = []
        if letters:
            at = random.choice(letters)
            other = random.choice("abcdmnpqxyzABCDMN".replace(span[0][at], ""))
            changed.append(span[0][:at] + other + span[0][at + 1 :])
        if signs:
            at = random.choice(signs)
            changed.append(span[0][:at] + random.choice("+-<=>".replace(span[0][at], "")) + span[0][at + 1 :])
        changed.append("")
        yield "formula", chinese[: span.start()] + random.choice(changed) + chinese[span.end() :]
    yield "language", english
    words = re.split(r"(?<=[.,]) ", english)
    if len(words) > 1:  # most of it left as it was
        yield "language", " ".join([*words[:-1], chinese.split(", ")[-1]])


def translation_rates(shared: Path, rounds: int = 5) -> dict[str, tuple[int, int]]:
    """By kind: of how many pairs `passed`, of how many mutations were refused, and out of how many."""
    random, counts = Random(0), collections.defaultdict(lambda: [0, 0])
    for english, chinese in translations(shared):
        counts["passed"][0] += translation_gate(english, chinese, "zh") is None
        counts["passed"][1] += 1
        for _ in range(rounds):
            for kind, mutated in mutations(english, chinese, random):
                counts[kind][0] += translation_gate(english, mutated, "zh") is not None
                counts[kind][1] += 1
    return {kind: (found, count) for kind, (found, count) in counts.items()}


HOSTILE = (
    "9^{9^{9^9}}",
    "10^{10^{10}}",
    "1000000000!",
    "(x+1)^{100000}",
    r"\frac{1}{" * 400 + "2" + "}" * 400,
    "x" * 4000,
)


def answers_to_grade(shared: Path, count: int = 10_000) -> list[tuple[str, str]]:
    """(output, gold answer) pairs: the pool's answers against their own, re-spelled and wrong ones; 1% are hostile."""
    random = Random(0)
    golds = [problem.answer for problem in pool(shared).values() if (problem.answer or "").strip()]
    pairs = []
    for i in range(count):
        gold = random.choice(golds) or ""
        kind = i % 100
        if kind == 0:
            answer = HOSTILE[i // 100 % len(HOSTILE)]
        elif kind < 50:
            answer = gold
        elif kind < 75:
            answer = gold.replace(r"\frac", r"\dfrac").replace(" ", "  ") + (" + 0" if gold.isdigit() else "")
        else:
            answer = random.choice(golds) or ""
        pairs.append((f"Thus the answer is \\boxed{{{answer}}}.", gold))
    return pairs


def problems_to_compare(shared: Path, count: int) -> Iterator[list[str]]:
    """Tokens of `count` statements: those of the pool with other numbers each round, a tenth of them said again."""
    texts = [problem.problem for problem in pool(shared).values()]
    random = Random(0)
    for i in range(count):
        text, turn = texts[i % len(texts)], i // len(texts)
        if random.random() < 0.1:
            yield tokens(typeset_anew(text))
        else:
            yield tokens(re.sub(r"\d+", lambda match, turn=turn: str(int(match[0][:6]) + 7 * turn), text))


def time_duplicates(shared: Path, count: int) -> tuple[float, int, int]:
    """Seconds of fingerprints and confirmation, without reading, for `count` problems; exact and near duplicates."""
    statements = list(problems_to_compare(shared, count))
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        fingerprints = Fingerprints(Path(folder) / "fingerprints")
        for words in statements:
            fingerprints.add(words)

        def confirm(one: int, other: int) -> str | None:
            return "alike" if same_problem(statements[one], statements[other], 0.8) is not None else None

        found = find_duplicates(fingerprints, confirm)
        seconds = time.perf_counter() - start
        fingerprints.close()
    reasons = collections.Counter(reason for _, reason, _ in found.values())
    return seconds, reasons["duplicate"], reasons["near_duplicate"]


def _of(pair: tuple[int, int]) -> str:
    return f"{pair[0]:,} of {pair[1]:,}"


def _report(shared: Path) -> Iterator[str]:
    """The paragraphs of results/curate.md."""
    yield f"# Curation, measured\n\n`python benchmarks/curation.py` at commit {commit()}; one process unless said."
    problems, named = pool(shared), labels("curation_labels.json")
    yield (
        f"Rules on {len(named)} hand-checked rows of the raw pool: 100 random ones, {len(named) - 100} of rarer "
        "kinds. The rules were written with these rows in view; other pools will be harder."
    )
    table = [
        f"| {name} | {r.found} | {r.missed} | {r.wrong} | {r.precision:.1%} | {r.recall:.1%} |"
        for name, r in rule_rates(problems, named).items()
    ]
    head = ["| rule | found | missed | wrong | precision | recall |", "|---|---|---|---|---|---|"]
    yield "\n".join(head + table)
    whole = [problems[name] for name, kinds in named.items() if not kinds]
    cut = list(cut_statements(whole))
    said, wrongly = (sum(RULES["incomplete"](one) is not None for one in some) for some in (cut, whole))
    yield (
        f"`incomplete` finds {_of((said, len(cut)))} statements cut off in the middle and flags "
        f"{_of((wrongly, len(whole)))} whole ones. Of whole sentences that mean nothing, which the label says of 3 "
        "rows, it finds those about points that nothing introduces."
    )
    marked, flagged = contamination(shared)
    others = flagged - marked
    kinds = collections.Counter(labels("contamination_labels.json").get(name, "unread") for name in others)
    yield (
        f"Decontamination against {len(EVALUATION_SETS)} evaluation sets finds "
        f"{_of((len(marked & flagged), len(marked)))} marked "
        f"rows and {len(others)} others. A person read these: {kinds['same']} are the same problem, "
        f"{kinds['variant']} the same sentence with other numbers, {kinds['different']} another problem "
        f"({kinds['different'] / len(problems):.2%} of the pool), {kinds['unread']} unread. Typeset anew, "
        f"{_of(retypeset(shared))} problems of MATH-500 and AIME 2024 are found."
    )
    seconds, exact, near = time_duplicates(shared, 100_000)
    yield f"100,000 problems are compared in {seconds:.0f} s: {exact:,} exact duplicates, {near:,} near ones."
    with Verifier(timeout_s=10.0) as verifier:
        rates = reformat_rates(shared, verifier)
    yield (
        f"The reformat gate, on 250 real pairs: it refuses {_of(rates['corrupt'])} corrupt rewrites and keeps "
        f"{_of(rates['good'])} good ones ({rates['good'][0] / rates['good'][1]:.1%}); "
        f"{rates['uncheckable'][1]} have no answer that could be compared."
    )
    rates = translation_rates(shared)
    yield (
        f"The translation gate, on OlymMATH: it passes {_of(rates.pop('passed'))} real pairs, and refuses "
        + ", ".join(f"{found / count:.1%} of {count:,} with another {kind}" for kind, (found, count) in rates.items())
        + "."
    )
    outputs = answers_to_grade(shared)
    start = time.perf_counter()
    with VerifierPool(2, timeout_s=5.0) as verifiers:
        rules = collections.Counter(verdict.rule for verdict in verifiers.verify_all(outputs))
    yield (
        f"{len(outputs):,} answers, 1% of them hostile, are graded in {time.perf_counter() - start:.0f} s, 2 workers, "
        f"load {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores "
        f"({', '.join(f'{count:,} by {rule}' for rule, count in rules.most_common())})."
    )


if __name__ == "__main__":
    text = "\n\n".join(_report(ROOT.parent / "shared" / "data")) + "\n"
    (ROOT / "benchmarks" / "results" / "curate.md").write_text(text, encoding="utf-8")
    print(text)
