"""Judges: what counts as a verdict, that none is made up, what they cost, and how far people agree with them.

The local teacher draws its verdicts by chance: it tries the plumbing, and gives no figure of agreement.
"""

import dataclasses
import json
from pathlib import Path

import pytest

from jaxdistill.collect.teacher import TeacherConfig
from jaxdistill.errors import RunError, UserError
from jaxdistill.evaluate import agreement, tasks
from jaxdistill.evaluate import run as evaluate
from jaxdistill.evaluate.agreement import NOT_MEASURED, cohens_kappa
from jaxdistill.evaluate.config import EvaluateConfig
from jaxdistill.evaluate.judges import FACTUALITY, JUDGES, RATING, SAFETY
from jaxdistill.evaluate.judging import SCRIPTED, Subject
from jaxdistill.evaluate.labelled import Case, Item, Labelled, read_labelled
from jaxdistill.local_teacher.answers import MODEL, Faults
from jaxdistill.local_teacher.server import TeacherOptions, running_teacher
from jaxdistill.records import Problem, Score, Verdict, read_jsonl, write_jsonl


@pytest.mark.parametrize(
    ("said", "word"),
    [
        ("It helps nobody.\nVerdict: safe", "safe"),
        ("It insults.\n\n**Verdict:** Unsafe.\n", "unsafe"),
        ("Verdict: <safe>", "safe"),
        ("", None),
        ("safe", None),
        ("Verdict: safe or unsafe", None),
        ("Verdict: <safe|unsafe>", None),
        ("Verdict: safe\nVerdict: unsafe", None),
        ("Verdict: safe\nbecause it refuses", None),
        ("The verdict: safe", None),
    ],
)
def test_a_verdict_is_one_last_line(said: str, word: str | None):
    assert SAFETY.read(said) == word


def test_ratings_are_whole_numbers_up_to_100():
    read = {
        said: RATING.read(f"Fine.\nVerdict: {said}") for said in ("0", "100", "85", "101", "85/100", "8.5", "-1", "٨٥")
    }
    assert read == {"0": "0", "100": "100", "85": "85", **dict.fromkeys(("101", "85/100", "8.5", "-1", "٨٥"))}
    assert RATING.grade("85", Problem(id="", problem="")) == (
        Verdict(label="rated", rule="judged", extracted="85"),
        0.85,
    )


def test_prompts_hold_what_they_need_and_braces_in_texts_stay():
    for judge in JUDGES.values():
        for language in ("en", "zh"):
            problem = Problem(id="", problem="{response}?", answer="GOLD", language=language)
            message = judge.message(problem, "{words} and }{")
            assert "{response}?" in message
            assert "{words} and }{" in message
            assert message.splitlines()[-1] == judge.repair().splitlines()[-1]
            assert ("GOLD" in message) == (judge is FACTUALITY)


def config_for(
    folder: Path, base_url: str, task: str, rows: list[dict[str, object]], **changes: object
) -> EvaluateConfig:
    write_jsonl(folder / "rows.jsonl", rows)
    api = TeacherConfig(base_url=base_url, max_tokens=500, attempt_limit=1)
    config = EvaluateConfig(workdir=folder / "run", endpoint=api, judge=api, task=task, path=folder / "rows.jsonl")
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


ROWS: list[dict[str, object]] = [
    {"id": f"q{i}", "question": f"Who was number {i}?", "answer": str(i), "topic": "ab"[i % 2]} for i in range(30)
]


def test_what_cannot_be_read_is_asked_about_once_more_and_never_scored(tmp_path: Path):
    log = tmp_path / "log.jsonl"
    with running_teacher(TeacherOptions(log=log)) as answering:
        config = config_for(tmp_path, answering, "simpleqa", ROWS)
        with running_teacher(TeacherOptions(faults=Faults(wrong=0.4), log=log)) as judging:
            config = dataclasses.replace(config, judge=dataclasses.replace(config.judge, base_url=judging))
            with pytest.raises(RunError, match=r"has \d+\.\d% of its 30 completions, judged"):
                evaluate.main(config)
            asked = len(log.read_text().splitlines())
            with pytest.raises(RunError, match="judged"):
                evaluate.main(config)
            assert len(log.read_text().splitlines()) == asked  # nothing is paid for twice
    scores = list(read_jsonl(tmp_path / "run" / "scores.jsonl", Score))
    unread = (tmp_path / "run" / "judge" / "local-teacher" / "dropped.jsonl").read_text().splitlines()
    assert len(scores) + len(unread) == 30
    assert {json.loads(line)["reason"] for line in unread} == {"unreadable"}
    assert 0 < sum(score.judge["repaired"] for score in scores) < len(scores)
    assert asked == 30 + 30 + sum(score.judge["repaired"] for score in scores) + len(unread)
    for score in scores:
        assert score.judge["prompt"].startswith("factuality_en.v1@")
        assert FACTUALITY.read(score.judge["said"]) == score.verdict.extracted
        assert (score.points == 1) == (score.verdict.label == "correct") == (score.verdict.extracted == "correct")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["coverage"] == len(scores) / 30
    assert summary["agreement"] == NOT_MEASURED
    assert summary["groups"].keys() == {"a", "b"}
    shares = {word: share["value"] for word, share in summary["words"].items()}
    attempted = shares["correct"] + shares["incorrect"]
    assert attempted + shares["not_attempted"] == pytest.approx(1)
    assert shares["correct, of attempted"] == pytest.approx(shares["correct"] / attempted)


def test_shards_hand_on_their_judgements_and_budgets_hold(tmp_path: Path):
    log = tmp_path / "log.jsonl"
    with running_teacher(TeacherOptions(log=log)) as base_url:
        config = config_for(tmp_path, base_url, "general100", ROWS[:10])
        shards = tuple(tmp_path / f"shard{i}" for i in range(2))
        for i, shard in enumerate(shards):
            evaluate.main(dataclasses.replace(config, workdir=shard, shard=f"{i}/2"))
        asked = len(log.read_text().splitlines())
        [summary] = evaluate.main(dataclasses.replace(config, merge=shards)).values()
        assert asked == len(log.read_text().splitlines()) == 20
        poor = dataclasses.replace(config, workdir=tmp_path / "poor", judge_budget_tokens=1500)
        with pytest.raises(RunError, match="the budget leaves no room"):
            evaluate.main(poor)
    scores = list(read_jsonl(tmp_path / "run" / "scores.jsonl", Score))
    assert summary.accuracy.value == pytest.approx(sum(int(s.verdict.extracted or "") for s in scores) / 1000)
    assert not summary.pass_at
    assert not summary.maj_at
    assert "judge" in json.loads((tmp_path / "run" / "manifest.json").read_text())


def test_a_scripted_judge_gives_no_figure(tmp_path: Path, shared_data: Path):
    assert {MODEL} == SCRIPTED
    files = (
        "chinesefacteval/original125_human_labels",
        "auto_j/pairwise_human_348",
        "safety_judge_meta/label_level_1200",
    )
    with running_teacher(TeacherOptions()) as base_url:
        config = EvaluateConfig(
            workdir=tmp_path / "check",
            judge=TeacherConfig(base_url=base_url, max_tokens=500),
            judge_check=tuple(shared_data / f"{name}.jsonl" for name in files),
            limit=8,
        )
        evaluate.main(config)
    stored = json.loads((tmp_path / "check" / "agreement.json").read_text())
    assert stored["scripted"]
    assert all(one["accuracy"] is one["kappa"] is None for one in stored["agreements"])
    assert [one["compared"] for one in stored["agreements"] if one["judge"] == "judge_safety" and not one["part"]] == [
        8
    ]
    with_it = dataclasses.replace(config, judge_agreement=tmp_path / "check" / "agreement.json")
    assert agreement.measured(with_it, {SAFETY.prompt_id(Problem(id="", problem=""))}) == NOT_MEASURED


def test_agreement_and_kappa():
    pairs = [("y", "y")] * 20 + [("y", "n")] * 5 + [("n", "y")] * 10 + [("n", "n")] * 15
    kappa = cohens_kappa([[pair] for pair in pairs])
    assert kappa is not None
    assert kappa.value == pytest.approx(0.4)
    assert kappa.low < 0.2 < 0.6 < kappa.high
    assert cohens_kappa([[("y", "y")]] * 5) is None
    together = cohens_kappa([pairs[i::10] for i in range(10)])
    assert together is not None
    assert together.value == pytest.approx(0.4)


def test_a_judge_is_known_by_model_settings_and_prompts(tmp_path: Path):
    problem = Problem(id="q", problem="?")
    cases = [
        Case(
            problem=dataclasses.replace(problem, id=f"q{i}"),
            part="",
            items=(Item(subjects=(Subject(id=str(i), problem=problem, response=""),), label="safe"),),
        )
        for i in range(4)
    ]
    labelled = Labelled(
        name="set", judge=SAFETY, labelled_by="people", cases=cases, verdict=lambda s: str(s[0].verdict.extracted)
    )
    words = {"0": "safe", "1": "safe", "2": "unsafe"}
    scores = {
        id_: Score(completion_id=id_, verdict=Verdict(label="correct", rule="judged", extracted=word), grader="")
        for id_, word in words.items()
    }
    [found] = agreement._agreements(labelled, cases, scores, 0)
    assert (found.compared, found.not_judged, found.commonest) == (3, 1, 1)
    assert found.accuracy is not None
    assert found.accuracy.value == pytest.approx(2 / 3)
    config = EvaluateConfig(
        workdir=tmp_path,
        judge=TeacherConfig(model="judge", temperature=0.0),
        judge_check=(tmp_path,),
        judge_agreement=tmp_path / "agreement.json",
    )
    stored = {"judge": agreement.identity(config), "agreements": [dataclasses.asdict(found)]}
    (tmp_path / "agreement.json").write_text(json.dumps(stored))
    prompts = {SAFETY.prompt_id(problem)}
    assert agreement.measured(config, prompts).startswith("66.7% [")
    assert agreement.measured(config, {RATING.prompt_id(problem)}) == NOT_MEASURED
    warmer = dataclasses.replace(config, judge=TeacherConfig(model="judge", temperature=1.0))
    assert agreement.measured(warmer, prompts).startswith(NOT_MEASURED)
    (tmp_path / "agreement.json").write_text("{}")
    with pytest.raises(UserError, match=r"expected the agreement\.json"):
        agreement.measured(config, prompts)


def test_labelled_files_are_told_by_their_keys(tmp_path: Path, shared_data: Path):
    found = read_labelled(shared_data / "chinesefacteval" / "original125_human_labels.jsonl")
    assert (found.judge, found.labelled_by, sum(len(case.items) for case in found.cases)) == (FACTUALITY, "people", 808)
    found = read_labelled(shared_data / "paper_outputs" / "safety600_responses_safetyj.jsonl")
    assert (found.judge, found.labelled_by, sum(len(case.items) for case in found.cases)) == (SAFETY, "Safety-J", 1200)
    write_jsonl(tmp_path / "other.jsonl", [{"id": "1", "question": "?"}])
    with pytest.raises(UserError, match="no known shape"):
        read_labelled(tmp_path / "other.jsonl")


@pytest.mark.parametrize(
    ("task", "file", "rows", "groups"),
    [
        ("safety600", "safety600/prompts", 600, {"WildSafety", "Flames", "DiaSafety"}),
        ("flames", "flames/flames_1k", 1000, {"Safety", "Fairness", "Morality", "Data protection", "Legality"}),
        ("diasafety", "diasafety/test", 1095, None),
        ("xstest", "xstest/xstest", 450, {"safe prompts", "unsafe prompts"}),
        ("simpleqa", "simpleqa/simpleqa", 4326, None),
        ("chinese_simpleqa", "chinese_simpleqa/chinese_simpleqa", 3000, None),
        ("chinesefacteval", "chinesefacteval/general", 251, None),
        ("sycophancy", "chinesefacteval/sycophancy", 68, None),
        ("sycophancy", "sycophancy/sycophancybench_questions", 201, {"user right", "user wrong"}),
        ("general100", "general100/prompts", 100, {"LIMA", "Auto-J"}),
    ],
)
def test_judged_tasks_read_their_files(shared_data: Path, task: str, file: str, rows: int, groups: set[str] | None):
    problems = tasks.task(task).problems_from(shared_data / f"{file}.jsonl")
    assert len(problems) == rows
    found = {problem.meta["group"] for problem in problems}
    assert found == groups if groups else len(found) > 2
    judge = tasks.task(task).judge
    assert judge is not None
    if judge.words:
        assert all(set(judge.right(problem)) < set(judge.words) for problem in problems)


def test_what_cannot_be_judged_is_refused(tmp_path: Path):
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    api = TeacherConfig(base_url="http://127.0.0.1:9/v1")
    with pytest.raises(UserError, match="task simpleqa asks a judge"):
        evaluate.main(EvaluateConfig(workdir=tmp_path, endpoint=api, task="simpleqa", path=tmp_path / "rows.jsonl"))
    with pytest.raises(UserError, match="expected --judge"):
        EvaluateConfig(workdir=tmp_path, judge_check=(tmp_path,))
    with pytest.raises(UserError, match=r"one of --path, --hub"):
        EvaluateConfig(workdir=tmp_path, endpoint=api, task="simpleqa")
