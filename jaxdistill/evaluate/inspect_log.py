"""An evaluation of one model as a log of inspect_ai's (its EvalLog, version 2), for its viewer and its data frames."""

import datetime
import json
from typing import Any

from jaxdistill import thinking
from jaxdistill.evaluate.grade import points
from jaxdistill.evaluate.results import Result
from jaxdistill.records import Completion, Problem, Score

_STOP_REASONS = {"stop": "stop", "length": "max_tokens"}


def document(result: Result) -> dict[str, Any]:
    """The log's JSON. A sample is a problem's, an epoch one of its completions.

    Only what was evaluated is in it: no time is told of any sample, and prompt tokens are not counted.
    """
    plan, summary = result.plan, result.summary
    problems = {problem.id: problem for problem in plan.problems}
    samples = [
        _sample(result, problems[completion.item_id], completion, score)
        for completion, score in zip(result.completions, result.scores, strict=True)
    ]
    accuracy = {"accuracy": summary.accuracy.value, "low": summary.accuracy.low, "high": summary.accuracy.high}
    metrics = {name: {"name": name, "value": value} for name, value in accuracy.items()}
    grader = plan.task.grader
    score = {"name": grader, "scorer": grader, "scored_samples": len(samples), "metrics": metrics}
    log = {
        "version": 2,
        "status": "success" if summary.coverage == 1 else "cancelled",
        "eval": {
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "task": plan.task.name,
            "dataset": {"name": plan.task.name, "location": str(plan.config.problems_file), "samples": len(problems)},
            "model": f"jaxdistill/{plan.name}",
            "config": {"epochs": plan.config.samples},
            "metadata": {"weights": plan.weights, "prompt": plan.task.prompt, "coverage": summary.coverage},
        },
        "results": {"total_samples": len(plan.wanted()), "completed_samples": len(samples), "scores": [score]},
        "samples": samples,
    }
    # Half an emoji, which APIs send at times, is no UTF-8, and inspect_ai does not read its escape: it becomes "?"
    return json.loads(json.dumps(log, ensure_ascii=False).encode(errors="replace"))


def _sample(result: Result, problem: Problem, completion: Completion, score: Score) -> dict[str, Any]:
    asked = [{"role": m["role"], "content": m["content"]} for m in result.plan.messages(problem)]
    thought, answer = thinking.split(completion.text)
    content = [] if thought is None else [{"type": "reasoning", "reasoning": thought}]
    said = {"role": "assistant", "content": [*content, {"type": "text", "text": answer}]}
    model = f"jaxdistill/{result.name}"
    tokens = completion.thinking_tokens + completion.answer_tokens
    usage = {"output_tokens": tokens, "total_tokens": tokens, "reasoning_tokens": completion.thinking_tokens}
    choice = {"message": said, "stop_reason": _STOP_REASONS[completion.finish_reason]}
    verdict = {"value": points(score), "answer": score.verdict.extracted, "explanation": score.verdict.rule}
    return {
        "id": problem.id,
        "epoch": completion.sample_index + 1,
        "input": asked,
        "target": problem.answer or "",
        "messages": [*asked, said],
        "output": {"model": model, "choices": [choice], "usage": usage},
        "scores": {score.grader: verdict},
        "metadata": {"completion_id": completion.id, "seed": completion.seed, "settings": dict(completion.settings)},
    }
