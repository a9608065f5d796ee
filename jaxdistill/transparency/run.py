"""A run scores itself: an indicator is answered where the run folders prove it, and left open elsewhere, with why."""

import collections
import json
from collections.abc import Callable, Mapping

from jaxdistill.lineage import Lineage, Stage
from jaxdistill.records import Chain, Problem, read_jsonl
from jaxdistill.transparency.index import Answer, Work, indicators

# Commands as manifests name them, of which none is reinforcement learning, and none but a collected journey searches
_OF_DATA = ("curate", "collect", "reformat", "import", "select", "translate", "mix", "examples")
STAGES = frozenset({"demo", *_OF_DATA, "train", "evaluate", "compare", "sample", "export", "launch", "fit"})
_ASKING = ("collect", "reformat", "translate")  # those that a teacher answers
_PUBLIC = "a run folder cannot show that something is public: give its address"


def work(lineage: Lineage, name: str, page: str = "") -> Work:
    """The answers that the run folders give; every one that they do not prove is open, for a person.

    Args:
      page: the run's report, which defines the metrics; empty if there is none.
    """
    answers = {indicator: _ANSWERS.get(indicator, _public)(lineage) for indicator in indicators()}
    answers["metrics_defined"] = _metrics(lineage, page)
    return Work(name=name, note="Answered by its own run folders (jaxdistill tti run).", answers=answers)


def _disclosed(evidence: list[str]) -> Answer:
    return Answer(verdict="disclosed", evidence=tuple(evidence))


def _open(reason: str, evidence: list[str] | None = None) -> Answer:
    return Answer(verdict="open", evidence=tuple(evidence or ()), reason=reason)


def _public(lineage: Lineage) -> Answer:
    return _open(_PUBLIC)


def _manifest(lineage: Lineage, stage: Stage, what: str) -> str:
    return f"{lineage.name(stage.folder / 'manifest.json')}: {what}"


def _sources(lineage: Lineage) -> Answer:
    """Every problem that the teacher was asked names its source, and all training data comes from them."""
    evidence = []
    if gaps := lineage.gaps:
        return _open("; ".join(gaps[:3]))
    if imported := lineage.of("import"):
        return _open(f"{lineage.name(imported[0].folder)} imported long thoughts: name where they come from")
    readers = lineage.of("collect", "reformat")
    if not readers:
        return _open("no stage here read problems: name the sources of the training data")
    for stage in readers:
        for i in stage.inputs:
            sources = collections.Counter(problem.source for problem in read_jsonl(i.path, Problem))
            if nameless := sources.pop("", 0):
                return _open(f"{nameless} problems of {lineage.name(i.path)} have no source")
            found = ", ".join(f"{source} ({count})" for source, count in sources.most_common(5))
            more = f" and {len(sources) - 5} more" if len(sources) > 5 else ""
            evidence.append(f"{lineage.name(i.path)}: every problem names its source: {found}{more}")
    return _disclosed(sorted(set(evidence)))


def _documented(lineage: Lineage) -> Answer:
    return _open("whether others could rebuild the data from its rows and counts is for a person to judge")


def _selection(lineage: Lineage) -> Answer:
    """Each problem asked became a row or has a receipt; that documents the rules, and does not justify them."""
    evidence = []
    for stage in lineage.of("curate", "import", *_ASKING):
        path = stage.folder / "dropped.jsonl"
        counts = ", ".join(f"{count} {name}" for name, count in stage.counts.items())
        evidence.append(f"{lineage.name(path)}: a receipt for everything dropped ({counts})")
    return _open("the rules are documented; why they are the right ones is for a person to say", evidence)


def _synthetic(lineage: Lineage) -> Answer:
    """The prompt is written down, and every chain that was kept was found correct."""
    evidence = []
    if imported := lineage.of("import"):
        return _open(f"{lineage.name(imported[0].folder)} imported long thoughts: say how they were made")
    for stage in lineage.of(*_ASKING):
        if not stage.manifest.get("prompt"):
            return _open(f"{lineage.name(stage.folder)} does not say which prompt it used")
        evidence.append(_manifest(lineage, stage, f"prompt {stage.manifest['prompt']['name'] or 'none'}, in full"))
    for stage in lineage.of("collect"):
        path = stage.folder / f"chains.{stage.config.get('chains_format', 'jsonl')}"
        if not path.is_file():
            return _open(f"{lineage.name(path)} is missing")
        labels = collections.Counter(chain.verdict.label for chain in read_jsonl(path, Chain))
        if labels.keys() - {"correct"}:
            return _open(f"{lineage.name(path)} has chains that were not found correct: {dict(labels)}")
        evidence.append(f"{lineage.name(path)}: all {labels.total()} chains verified, each with its rule")
    return _disclosed(evidence) if evidence else _open("no stage here asked a teacher")


def _base_model(lineage: Lineage) -> Answer:
    """The configuration of the model trained from, which gives architecture and size, and the hash of its weights."""
    evidence = []
    for stage in lineage.of("train"):
        config = next((i for i in stage.inputs if i.path.name == "config.json"), None)
        if config is None or config.found != "same":
            return _open(f"the config.json that {lineage.name(stage.folder)} trained from is not here")
        values = json.loads(config.path.read_text(encoding="utf-8"))
        names = ("model_type", "num_hidden_layers", "hidden_size", "vocab_size")
        size = ", ".join(f"{name} {values.get(name)}" for name in names)
        evidence.append(f"{lineage.name(config.path)}: {size}; weights {stage.manifest['model'][:19]}...")
    return _disclosed(evidence) if evidence else _open("no stage here trained a model")


def _unused(what: str) -> Callable[[Lineage], Answer]:
    def answer(lineage: Lineage) -> Answer:
        """A whole lineage leaves no room for a stage that is not in it."""
        if reason := _incomplete(lineage):
            return _open(f"whether {what} was used cannot be told: {reason}")
        if strange := sorted({stage.command for stage in lineage.stages.values()} - STAGES):
            return _open(f"whether {', '.join(strange)} is {what} is for a person to say")
        names = ", ".join(dict.fromkeys(stage.command for stage in lineage.stages.values()))
        said = f"the stages are {names}; none of them is {what} (how base model and teacher were made is not told here)"
        return Answer(verdict="unused", evidence=(said,))

    return answer


def _search(lineage: Lineage) -> Answer:
    """A journey goes back to the last right step of an attempt that was wrong, which is a search."""
    journeys = [stage for stage in lineage.of("collect") if stage.manifest.get("method") == "journey"]
    if not journeys:
        return _unused("a search")(lineage)
    evidence = [_manifest(lineage, stage, "method journey, with its prompts in full") for stage in journeys]
    return _open("whether that describes the search with all its components is for a person to say", evidence)


def _incomplete(lineage: Lineage) -> str:
    """Why the lineage does not reach from an evaluation of a trained model back to its data; empty if it does."""
    for stage in lineage.of("evaluate"):
        behind = lineage.behind(stage)
        if any(before.command == "train" for before in behind):
            break
    else:
        return "no evaluation here is of a model that was trained here"
    return "; ".join(lineage.gaps[:3])


def _long_thought(lineage: Lineage) -> Answer:
    """Chains by a known teacher with a known prompt, and they are what the model was trained on."""
    trained = {before.folder for stage in lineage.of("train") for before in lineage.behind(stage)}
    evidence = [
        _manifest(lineage, stage, f"teacher {', '.join(stage.manifest['teacher'])}, its prompt, what was kept and why")
        for stage in lineage.of("collect")
        if stage.folder in trained
    ]
    return _disclosed(evidence) if evidence else _open("no chains that were collected here were trained on")


def _pipeline(lineage: Lineage) -> Answer:
    if reason := _incomplete(lineage):
        return _open(reason)
    order = " -> ".join(lineage.name(stage.folder) for stage in lineage.stages.values())
    return _disclosed([f"every input of every stage is there with the hash that was read: {order}"])


def _compute(lineage: Lineage) -> Answer:
    """The devices of each training run, and how long its steps took."""
    evidence = []
    for stage in lineage.of("train"):
        if "devices" not in stage.manifest:
            return _open(f"{lineage.name(stage.folder)} does not say on how many devices it ran")
        evidence.append(_manifest(lineage, stage, f"devices {stage.manifest['devices']}; step times in metrics.jsonl"))
    return _disclosed(evidence) if evidence else _open("no stage here trained a model")


def _hyperparameters(lineage: Lineage) -> Answer:
    stages = lineage.of(*_OF_DATA, "train", "evaluate")
    if lacking := [lineage.name(stage.folder) for stage in stages if not stage.config]:
        return _open(f"no config.json in {', '.join(lacking)}")
    evidence = [f"{lineage.name(s.folder / 'config.json')}: every setting, defaults included" for s in stages]
    return _disclosed(evidence) if lineage.of("train") else _open("no stage here trained a model")


def _ablations(lineage: Lineage) -> Answer:
    trained = [lineage.name(stage.folder) for stage in lineage.of("train")]
    return _open(f"which components are major is for a person to say; trained here: {', '.join(trained) or 'nothing'}")


def _benchmarks(lineage: Lineage) -> Answer:
    return _of_tasks(lineage, lambda task: task.get("why", ""), "does not say why its task was chosen")


def _granularity(lineage: Lineage) -> Answer:
    """The grader in use compares answers; what else one may do is its name's to say."""
    level = {"boxed_math": "grader boxed_math: the last boxed answer, not the steps"}
    return _of_tasks(lineage, lambda task: level.get(task.get("grader", ""), ""), "has a grader that is not known here")


def _of_tasks(lineage: Lineage, statement: Callable[[Mapping[str, str]], str], otherwise: str) -> Answer:
    """What every evaluation says of its task."""
    evidence = []
    for stage in lineage.of("evaluate"):
        said = statement(stage.manifest["task"])
        if not said:
            return _open(f"{lineage.name(stage.folder)} {otherwise}")
        evidence.append(_manifest(lineage, stage, f"task {stage.manifest['task']['name']}: {said}"))
    return _disclosed(evidence) if evidence else _open("no stage here evaluated a model")


def _metrics(lineage: Lineage, page: str) -> Answer:
    evaluations = lineage.of("evaluate")
    if not evaluations:
        return _open("no stage here evaluated a model")
    if not page:
        return _open("jaxdistill report writes a page that defines every metric; publish it, or your own")
    names = sorted({stage.manifest["task"]["metric"] for stage in evaluations})
    return _disclosed([f"{page}, section What the numbers mean: {', '.join(names)}, pass@k, maj@k, intervals"])


def _custom_metrics(lineage: Lineage) -> Answer:
    return _open("which metrics are the work's own, and why they were needed, is for a person to say")


def _alike(lineage: Lineage) -> Answer:
    """The model before training was evaluated in all ways as the model after it."""
    seen: dict[str, list[Stage]] = {}
    for stage in lineage.of("evaluate"):
        read = [i for i in stage.inputs if i.path.name != "config.json"]
        task, config = stage.manifest["task"], stage.config
        names = ("limit", "limit_seed", "samples", "sampling", "compute_dtype", "thinking_limits", "waits")
        same = {name: config.get(name) for name in names}
        data = stage.manifest["inputs"][read[0].recorded]
        key = json.dumps([data, {k: task[k] for k in ("name", "prompt", "grader", "metric")}, same], sort_keys=True)
        seen.setdefault(key, []).append(stage)
    if not seen:
        return _open("no stage here evaluated a model")
    trained = {stage.folder for stage in lineage.of("train")}
    for stages in seen.values():
        after = [s for s in stages if any(b.folder in trained for b in lineage.behind(s))]
        if not after or len(after) == len(stages):
            names = ", ".join(lineage.name(s.folder) for s in stages)
            return _open(f"no model from before training was evaluated in the same way as {names}")
    groups = [", ".join(lineage.name(stage.folder) for stage in stages) for stages in seen.values()]
    return _disclosed([f"{names}: same problems by hash, prompt, grader, samples and sampling" for names in groups])


def _sampling(lineage: Lineage) -> Answer:
    evidence = []
    for stage in lineage.of("evaluate"):
        sampling = stage.config.get("sampling")
        if not sampling:
            return _open(f"{lineage.name(stage.folder)} has no config.json with its sampling")
        said = ", ".join(f"{name} {value}" for name, value in sampling.items())
        evidence.append(f"{lineage.name(stage.folder / 'config.json')}: {said}, {stage.config['samples']} samples")
    return _disclosed(evidence) if evidence else _open("no stage here evaluated a model")


_ANSWERS: Mapping[str, Callable[[Lineage], Answer]] = {
    "data_sources": _sources,
    "data_documented": _documented,
    "selection_criteria": _selection,
    "synthetic_generation": _synthetic,
    "base_model": _base_model,
    "search_algorithm": _search,
    "reinforcement_learning": _unused("reinforcement learning"),
    "long_thought": _long_thought,
    "pipeline": _pipeline,
    "compute": _compute,
    "hyperparameters": _hyperparameters,
    "ablations": _ablations,
    "benchmark_choice": _benchmarks,
    "granularity": _granularity,
    "custom_metrics": _custom_metrics,
    "metrics_alike": _alike,
    "sampling_conditions": _sampling,
}
