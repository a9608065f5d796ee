"""Refining: gates by example and on real pairs, translation against a server, selection, import and mix."""

import contextlib
import dataclasses
import http.server
import json
import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import curation
import pytest

from jaxdistill.collect.calls import Receipt
from jaxdistill.collect.teacher import TeacherConfig
from jaxdistill.curate import adopt, mix, select, translate
from jaxdistill.curate.formats import UnknownShape, read_row, split_thought
from jaxdistill.curate.gates import reformat_gate, translation_gate
from jaxdistill.curate.reflection import _CORRECTION, _CORRECTIONS, _MARKER, MARKERS, backtracks, count_markers, reflect
from jaxdistill.curate.text import language, named_numbers, numbers, tokens
from jaxdistill.errors import RunError, UserError
from jaxdistill.local_teacher.answers import Faults
from jaxdistill.local_teacher.server import TeacherOptions, running_teacher
from jaxdistill.reading import Dropped
from jaxdistill.records import Example, Problem, Verdict, read_jsonl, write_jsonl
from jaxdistill.verify import Verifier, VerifierPool

ENGLISH = "A triangle has sides $a = 3$, $b = 4$ and a right angle. Find the third side, given that it is less than 6."
CHINESE = "一个三角形的边长为 $a = 3$, $b = 4$, 且有一个直角. 已知第三边小于 6, 求第三边."


@pytest.mark.parametrize(
    ("mutated", "reason"),
    [
        (CHINESE, None),
        (CHINESE.replace("于 6", "于 8"), "numbers_changed"),
        (CHINESE.replace("a = 3", "a = 8"), "latex_changed"),
        (CHINESE.replace("$b = 4$", ""), "latex_changed"),
        (ENGLISH, "wrong_language"),
        (CHINESE.replace("求第三边", "find the third side"), "wrong_language"),
        ("三角形の辺は $a = 3$, $b = 4$ です。6 より小さい。", "wrong_language"),
        (CHINESE + " \\boxed{5}", "box_changed"),
        (CHINESE + "```\nx\n```", "code_changed"),
        ("<think>" + CHINESE, "code_changed"),
    ],
)
def test_a_translation_keeps_numbers_formulas_boxes_code_and_tags(mutated: str, reason: str | None) -> None:
    refused = translation_gate(ENGLISH, mutated, "zh")
    assert (refused and refused[0]) == reason


def test_the_translation_gate_on_real_pairs(shared_data: Path) -> None:
    rates = curation.translation_rates(shared_data)
    assert rates["passed"][1] == 200
    assert rates["passed"][0] >= 0.95 * 200
    for kind in ("number", "formula", "language"):
        refused, count = rates[kind]
        assert refused >= 0.99 * count, kind


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier(timeout_s=10.0) as one:
        yield one


OLD = "So 3 + 4 = 7, which is \\boxed{7}."
NEW = "First we add the two numbers, 3 and 4, which gives 7. The answer is \\boxed{7}."


@pytest.mark.parametrize(
    ("question", "solution", "reason"),
    [
        ("What is 3 + 4?", NEW, None),
        ("Add 3 to 4.", NEW, None),
        ("What is 3 + 4?", NEW.replace("7}", "9}"), "wrong"),
        ("What is 3 + 5?", NEW, "numbers_changed"),
        ("What is 3 + 4?", "\\boxed{7}", "not_longer"),
    ],
)
def test_a_rewrite_keeps_answer_and_numbers_and_grows(
    question: str, solution: str, reason: str | None, verifier: Verifier
) -> None:
    problem = Problem(id="p", problem="What is 3 + 4?", answer="7", solution=OLD)
    refused = reformat_gate(problem, question, solution, verifier)
    assert (refused and refused[0]) == reason


def test_every_part_of_an_answer_counts(verifier: Verifier) -> None:
    problem = Problem(id="p", problem="a) 1 + 1? b) 2 + 1?", answer="3", solution="\\boxed{2} and \\boxed{3}")
    assert reformat_gate(problem, problem.problem, "a) It is \\boxed{2}. b) And it is \\boxed{3}.", verifier) is None
    refused = reformat_gate(problem, problem.problem, "a) It is \\boxed{1}. b) And it is \\boxed{3}.", verifier)
    assert refused == ("answer_changed", "no box has 2")


def test_the_reformat_gate_on_real_pairs(shared_data: Path, verifier: Verifier) -> None:
    rates = curation.reformat_rates(shared_data, verifier)
    assert sum(count for _, count in rates.values()) == 250
    assert rates["corrupt"][0] == rates["corrupt"][1] == 9
    assert rates["good"][0] >= 0.91 * rates["good"][1]


def test_tokens_survive_typesetting() -> None:
    one = "Let $x \\leqslant \\dfrac{1}{2}$ and $90^\\circ$; there are 10{,}000 of $\\left(a\\right)$."
    other = "Let \\(x\\le\\frac 1 2\\) and 90°,  there are 10,000 of \\[(a)\\]"
    assert tokens(one) == tokens(other)


def test_numbers_in_digits_and_in_words() -> None:
    assert numbers("007 and 1,000 and 2.50 and x_1") == {"7": 1, "1000": 1, "2.5": 1, "1": 1}
    assert named_numbers("twelve of one") == {"12": 1, "1": 1}
    assert named_numbers("十二个, 二十") == {"12": 1, "20": 1}
    assert not named_numbers("三角形")


@pytest.mark.parametrize(
    ("text", "found"),
    [(ENGLISH, "en"), (CHINESE, "zh"), ("これはペンです", "other"), ("$x$", "other"), ("Найдите число", "other")],
)
def test_language(text: str, found: str) -> None:
    assert language(text) == found


def test_backtracking_is_a_result_that_changes_after_words_of_correction() -> None:
    assert backtracks("So x = 5. Wait, that is wrong. Actually x = 7.") == [("x", "5", "7")]
    assert backtracks("3 * 4 = 11. Let me recheck: 3 * 4 = 12.") == [("3*4", "11", "12")]
    assert backtracks("于是 x = 5. 不对, 重新计算, x = 7.") == [("x", "5", "7")]
    assert backtracks("If x = 5 then y = 1. If x = 7 then y = 2.") == []
    assert backtracks("x = 5. Wait, is that right? Yes, x = 5.") == []


def test_markers_are_counted_in_both_languages() -> None:
    assert count_markers("Wait, let me verify and double-check. Note that 2 is even. In summary, await.") == 4
    assert count_markers("等等, 我来验证一下.") == 2
    assert reflect("wait " * 10).score(5.0) == 1000.0


def test_looking_at_first_letters_changes_nothing_that_is_found(shared_data: Path) -> None:
    plain = {
        _MARKER: [alternative for alternatives in MARKERS.values() for alternative in alternatives],
        _CORRECTION: list(_CORRECTIONS),
    }
    texts = ["WAIT, Verify; Ｗait. 等等, 实际上: ſhould be, DOUBLE CHECK, re-check, recheck, to wait", ENGLISH, CHINESE]
    for path in sorted((shared_data / "long_thought").glob("*.jsonl")):
        rows = path.read_text(encoding="utf-8").splitlines()
        texts += [json.dumps(json.loads(row), ensure_ascii=False) for row in rows[:20]]
    for fast, alternatives in plain.items():
        slow = re.compile("|".join(alternatives), re.IGNORECASE)
        found = [[match.span() for match in fast.finditer(text)] for text in texts]
        assert found == [[match.span() for match in slow.finditer(text)] for text in texts]
        assert sum(map(len, found)) > 100


def chain(name: str, text: str) -> Example:
    return Example(id=name, messages=({"role": "user", "content": "?"}, {"role": "assistant", "content": text}))


def test_select_takes_the_most_reflective(tmp_path: Path) -> None:
    filler = "and so we add the numbers up " * 30
    rows = [
        chain("plain", filler),
        chain("marked", "Wait, let me verify. " + filler),
        chain("turned", "So x = 5. Wait, that is wrong, x = 7. " + filler),
        chain("short", "Wait! Wait!"),
    ]
    write_jsonl(tmp_path / "examples.jsonl", rows)
    config = select.SelectConfig(examples=tmp_path / "examples.jsonl", workdir=tmp_path / "run", count=2)
    assert select.main(config) == {"kept": 2, "less_reflective": 1, "too_short": 1}
    assert [one.id for one in read_jsonl(tmp_path / "run" / "examples.jsonl", Example)] == ["marked", "turned"]
    scores = {row.id: row for row in read_jsonl(tmp_path / "run" / "scores.jsonl", select.Scored)}
    assert scores["turned"].backtracks == 1
    assert scores["turned"].score > scores["marked"].score > scores["plain"].score == 0
    with pytest.raises(UserError, match="count is 0"):
        select.SelectConfig(examples=tmp_path, workdir=tmp_path, count=0)


def test_select_finds_reflection_in_real_long_thought(shared_data: Path, tmp_path: Path) -> None:
    """Reasoning models reflect more than what a tree search wrote, which reflects more than textbook solutions."""
    means = []
    for name in ("r1_distill_qwen32b_limo", "journey_aime_exp5"):
        inputs = (shared_data / f"long_thought/{name}.jsonl",)
        adopt.main(adopt.ImportConfig(inputs=inputs, workdir=tmp_path / name, verify=False))
        config = select.SelectConfig(examples=tmp_path / name / "examples.jsonl", workdir=tmp_path / f"{name}-best")
        select.main(config)
        scores = [row.score for row in read_jsonl(config.workdir / "scores.jsonl", select.Scored)]
        means.append(sum(scores) / len(scores))
    solutions = [problem.solution for problem in curation.pool(shared_data).values() if problem.solution][::20]
    means.append(sum(reflect(text).score(5.0) for text in solutions) / len(solutions))
    assert means == sorted(means, reverse=True)
    assert means[0] > 3 * means[2]


SHAPES: dict[str, tuple[Mapping[str, object], tuple[str, str, str | None, str | None]]] = {
    "math": ({"problem": "p", "answer": 5, "solution": "s"}, ("problem", "p", None, None)),
    "gsm8k": ({"question": "p", "answer": "steps\n#### 5"}, ("problem", "p", None, None)),
    "messages": (
        {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "<think>\nt\n</think>\nr"}]},
        ("messages", "p", "t", "r"),
    ),
    "reasoning_content": (
        {
            "messages": [
                {"role": "user", "content": "p"},
                {"role": "assistant", "content": "r", "reasoning_content": "t"},
            ]
        },
        ("messages", "p", "t", "r"),
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "value": "r"}]},
        ("messages", "p", None, "r"),
    ),
    "alpaca": ({"instruction": "p", "input": "more", "output": "r"}, ("response", "p\n\nmore", None, "r")),
    "prompt": ({"prompt": "p", "response": "t</think>r"}, ("response", "p", "t", "r")),
    "trace": ({"problem": "p", "reasoning": "t", "response": "r", "answer": "5"}, ("reasoning", "p", "t", "r")),
    "reasoning": ({"question": "p", "reasoning": "t", "answer": "5"}, ("reasoning", "p", "t", "5")),
    "marco": (
        {"problem": "p", "response": "<Thought>\nt\n</Thought>\n<Output>\nr\n</Output>"},
        ("response", "p", "t", "r"),
    ),
    "sky": (
        {
            "prompt": "p",
            "completion": "<|begin_of_thought|>t<|end_of_thought|><|begin_of_solution|>r<|end_of_solution|>",
        },
        ("response", "p", "t", "r"),
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_found_by_themselves(name: str) -> None:
    values, expected = SHAPES[name]
    row = read_row(values)
    assert (row.shape, row.problem, row.reasoning, row.response) == expected
    if name == "gsm8k":
        assert (row.answer, row.solution) == ("5", "steps")


@pytest.mark.parametrize(
    "values", [{"text": "p"}, {"messages": "p"}, {"messages": []}, {"problem": None}, {"problem": " "}]
)
def test_no_shape_fits_is_said_with_the_keys_found(values: dict[str, object]) -> None:
    with pytest.raises(UnknownShape, match=rf"keys \['{next(iter(values))}'\] fit no known shape; expected .*messages"):
        read_row(values)


def test_a_thought_that_never_ends_is_unfinished() -> None:
    assert split_thought("<think> and then") == ("and then", "", True)
    assert split_thought("plain") == (None, "plain", False)


def test_import_makes_one_text_form_and_receipts(tmp_path: Path) -> None:
    rows = [values for values, _ in SHAPES.values()]
    rows += [{"prompt": "p", "response": "<think> cut"}, {"text": "?"}]
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n{")
    config = adopt.ImportConfig(inputs=(tmp_path / "set.jsonl",), workdir=tmp_path / "run", verify=False)
    counts = adopt.main(config)
    assert counts == {"kept": 9, "malformed": 1, "no_response": 2, "unfinished": 1, "unknown_shape": 1}
    examples = list(read_jsonl(tmp_path / "run" / "examples.jsonl", Example))
    assert len({one.id for one in examples}) == 9
    assert examples[0].messages[-1] == {"role": "assistant", "content": "<think>\nt\n</think>\nr"}
    places = [row.place for row in read_jsonl(tmp_path / "run" / "dropped.jsonl", Dropped)]
    assert f"{tmp_path / 'set.jsonl'}:{len(rows) + 1}" in places


def test_import_of_real_sets_keeps_what_verifies(shared_data: Path, tmp_path: Path) -> None:
    names = ("deepseek_reasoner_mmlupro", "journey_aime_exp5", "marco_o1_demo", "r1_distill_qwen32b_limo")
    kept = {}
    for name in names:
        inputs = (shared_data / f"long_thought/{name}.jsonl",)
        kept[name] = adopt.main(adopt.ImportConfig(inputs=inputs, workdir=tmp_path / name))
        assert "unknown_shape" not in kept[name]
    assert kept["r1_distill_qwen32b_limo"] == {"kept": 291}
    assert kept["marco_o1_demo"]["kept"] >= 120
    assert kept["journey_aime_exp5"]["kept"] >= 330
    assert kept["journey_aime_exp5"]["wrong"] >= 1
    assert kept["deepseek_reasoner_mmlupro"]["kept"] >= 95


def test_a_judge_decides_what_no_rule_can_compare(tmp_path: Path) -> None:
    rows = [
        {"id": f"{kind}{i}", "problem": f"Where is {i}?", "response": f"\\boxed{{{answer}}}", "answer": gold}
        for i in range(10)
        for kind, answer, gold in (("open", f"（见 {i}）", f"（在 {i}）"), ("right", "7", "7"), ("wrong", "8", "7"))
    ]
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = adopt.ImportConfig(inputs=(tmp_path / "set.jsonl",), workdir=tmp_path / "run")
    assert adopt.main(config) == {"kept": 10, "unverifiable": 10, "wrong": 10}
    log = tmp_path / "log.jsonl"
    with running_teacher(TeacherOptions(log=log, faults=Faults(wrong=0.3))) as base_url:
        judged = dataclasses.replace(config, judge=TeacherConfig(base_url=base_url), judge_budget_tokens=2000)
        with pytest.raises(RunError, match="the judge: over budget; run the same command again"):
            adopt.main(judged)
        judged = dataclasses.replace(judged, judge_budget_tokens=None)
        counts = adopt.main(judged)
        answers = len(log.read_text().splitlines())
        assert answers == 10
        assert adopt.main(judged) == counts
        assert len(log.read_text().splitlines()) == answers  # asked once
    assert sum(counts.values()) == 30
    assert counts["kept"] > 10
    assert counts["wrong"] > 10
    facts = json.loads((config.workdir / "manifest.json").read_text())["judge"]
    assert (facts["asked"], facts["decided"]) == (10, 10 - counts.get("unverifiable", 0))
    kept = [one.id for one in read_jsonl(config.workdir / "examples.jsonl", Example)]
    assert kept == [row["id"] for row in rows if row["id"] in kept]
    receipts = {row.id: row for row in read_jsonl(config.workdir / "dropped.jsonl", Dropped)}
    assert {*kept, *receipts} == {row["id"] for row in rows}
    assert any("rule judge/local-teacher/same_answer.v1@" in row.detail for row in receipts.values())
    with pytest.raises(UserError, match="judge is set and verify is not"):
        dataclasses.replace(judged, verify=False)


def test_long_rows_are_compared_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that memory is bounded by their length, and with the same result."""
    said = "<think>Let us see.</think>\\boxed{1}"
    rows = [{"id": f"{i}", "problem": f"{i}?", "response": said, "answer": f"{i % 3}"} for i in range(30)]
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, rows)))
    compared: list[int] = []
    verify_all = VerifierPool.verify_all

    def counted(self: VerifierPool, outputs: list[tuple[str, str]], **options: bool) -> Iterator[Verdict]:
        compared.append(len(outputs))
        return verify_all(self, outputs, **options)

    monkeypatch.setattr(VerifierPool, "verify_all", counted)
    for name in ("together", "apart"):
        adopt.main(adopt.ImportConfig(inputs=(tmp_path / "set.jsonl",), workdir=tmp_path / name))
        monkeypatch.setattr(adopt, "_GROUP_CHARACTERS", 3 * len("Let us see.\\boxed{1}"))
    assert compared == [30] + 10 * [3]
    together, apart = ((tmp_path / name / "examples.jsonl").read_bytes() for name in ("together", "apart"))
    assert together == apart != b""


def test_nothing_to_import_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "set.jsonl").write_text('{"text": "?"}\n')
    with pytest.raises(RunError, match="nothing was kept"):
        adopt.main(adopt.ImportConfig(inputs=(tmp_path / "set.jsonl",), workdir=tmp_path / "run"))


@contextlib.contextmanager
def translator(answers: Mapping[str, list[str]]) -> Iterator[tuple[str, list[str]]]:
    """A server that translates by its table: the base URL, and the texts it was asked for; the last answer repeats."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            text = next(name for name in answers if name in body["messages"][-1]["content"])
            tries = answers[text]
            message = {"role": "assistant", "content": tries[min(asked.count(text), len(tries) - 1)]}
            asked.append(text)
            usage = {"prompt_tokens": 1, "completion_tokens": 1}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            reply = json.dumps({"id": "1", "model": "local-teacher", "choices": [choice], "usage": usage}).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1", asked
        finally:
            server.shutdown()
            thread.join()


def test_a_refused_translation_is_asked_for_once_more_then_dropped(tmp_path: Path) -> None:
    answer, answer_zh = (
        "<think>\nAdd 3 and 4.\n</think>\nIt is \\boxed{7}.",
        "<think>\n把 3 和 4 相加.\n</think>\n结果是 \\boxed{7}.",
    )
    table = {
        ENGLISH: [CHINESE],
        "Add 3 and 4.": ["把 5 和 4 相加.", "把 3 和 4 相加."],  # right at the second try
        "It is \\boxed{7}.": ["结果是 \\boxed{7}."],
        "What are 5 and 6?": ["5 和 6 是什么?"],
        "They are numbers.": ["They are numbers."],  # never translated
    }
    rows = [
        Example(id="good", messages=({"role": "user", "content": ENGLISH}, {"role": "assistant", "content": answer})),
        Example(
            id="bad",
            messages=(
                {"role": "user", "content": "What are 5 and 6?"},
                {"role": "assistant", "content": "They are numbers."},
            ),
        ),
    ]
    write_jsonl(tmp_path / "examples.jsonl", rows)
    with translator(table) as (base_url, asked):
        teacher = TeacherConfig(base_url=base_url)
        workdir = tmp_path / "zh"
        config = translate.TranslateConfig(examples=tmp_path / "examples.jsonl", workdir=workdir, teacher=teacher)
        assert translate.main(config) == {"kept": 1, "wrong_language": 1}
        assert len(asked) == 7
        assert translate.main(config) == {"kept": 1, "wrong_language": 1}
        assert len(asked) == 7  # all answers are in the ledger
    (kept,) = read_jsonl(tmp_path / "zh" / "examples.jsonl", Example)
    assert (kept.id, kept.provenance) == ("good/zh", ("good",))
    assert [message["content"] for message in kept.messages] == [CHINESE, answer_zh]
    (receipt,) = read_jsonl(tmp_path / "zh" / "dropped.jsonl", Receipt)
    assert (receipt.reason, receipt.problem_id) == ("wrong_language", "bad@1")

    both = (tmp_path / "examples.jsonl", tmp_path / "zh" / "examples.jsonl")
    mixed = mix.MixConfig(examples=both, workdir=tmp_path / "mix", pairs=True)
    assert mix.main(mixed) == {"kept": 2, "en": 1, "zh": 1, "without_pair": 1}
    assert {one.id for one in read_jsonl(tmp_path / "mix" / "examples.jsonl", Example)} == {"good", "good/zh"}
    with pytest.raises(UserError, match="no such file"):
        mix.main(mix.MixConfig(examples=(tmp_path / "none.jsonl",), workdir=tmp_path / "none"))
    with pytest.raises(UserError, match="more than once"):
        mix.main(mix.MixConfig(examples=(both[0], both[0]), workdir=tmp_path / "twice"))
