"""Teacher profiles as data: what each model is sent, when it warns, what it costs; and one real call to check one."""

import datetime
import hashlib
from pathlib import Path

import pytest

from jaxdistill.collect import check, profiles
from jaxdistill.collect.prices import NANO, Prices
from jaxdistill.collect.teacher import Teacher, TeacherConfig
from jaxdistill.errors import RunError, UserError
from jaxdistill.local_teacher.app import TeacherOptions
from jaxdistill.local_teacher.server import running_teacher
from jaxdistill.records import Usage

MESSAGES = ({"role": "system", "content": "Think."}, {"role": "user", "content": "2 + 2?"})
TODAY = datetime.date(2026, 11, 25)


def body(model: str, **settings: object) -> dict[str, object]:
    return Teacher(TeacherConfig(model=model, **settings)).request(MESSAGES).body  # type: ignore[arg-type]


def test_each_model_is_sent_what_it_takes():
    assert body("o1-preview") == {
        "model": "o1-preview",
        "messages": [{"role": "user", "content": "Think.\n\n2 + 2?"}],
        "max_completion_tokens": 32_768,
    }
    o3 = body("o3", reasoning_effort="high")
    assert o3["messages"][0] == {"role": "developer", "content": "Think."}  # type: ignore[index]
    assert (o3["max_completion_tokens"], o3["reasoning_effort"]) == (32_768, "high")
    through = body("gpt-5.6-sol", transport="responses", reasoning_effort="low")
    assert through == {
        "model": "gpt-5.6-sol",
        "input": [{"role": "developer", "content": "Think."}, {"role": "user", "content": "2 + 2?"}],
        "max_output_tokens": 32_768,
        "reasoning": {"effort": "low", "summary": "auto"},
    }
    deepseek = body("deepseek-reasoner", base_url="https://api.deepseek.com")
    assert "max_tokens" in deepseek
    router = body("deepseek/deepseek-r1", base_url="https://openrouter.ai/api/v1", temperature=0.6)
    assert (router["usage"], router["temperature"]) == ({"include": True}, 0.6)
    own = body("Qwen/Qwen3-8B", base_url="http://localhost:8000/v1", profile="vllm", top_p=0.9)
    assert (own["max_tokens"], own["top_p"]) == (32_768, 0.9)
    named = body("any", base_url="http://localhost:8000/v1", max_tokens_parameter="max_tokens", extra={"top_k": 5})
    assert (named["max_tokens"], named["top_k"]) == (32_768, 5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": "o3", "temperature": 0.5}, "o3 does not take it"),
        ({"model": "o1-preview", "reasoning_effort": "low"}, "o1-preview does not take it"),
        ({"model": "o1-mini", "transport": "responses"}, "o1-mini takes chat, batch"),
        ({"model": "o3-pro", "transport": "batch"}, "o3-pro takes background, responses, responses_batch"),
        ({"model": "o3", "profile": "unheard"}, r"expected one of .*'deepseek', 'local', 'openai'"),
    ],
)
def test_what_a_model_does_not_take_is_refused_before_anything_is_sent(settings: dict[str, str], words: str):
    with pytest.raises(UserError, match=words):
        Teacher(TeacherConfig(**settings))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("o1-preview", ["o1-preview was retired on 2025-07-28: expect every request to be refused; its successor is"]),
        ("o4-mini-2025-04-16", ["was retired on 2026-10-23"]),
        ("o3", ["o3 retires on 2026-12-11, in 16 days"]),
        ("gpt-5.6-sol", []),
        ("gpt-5.1", []),
    ],
)
def test_retired_models_warn(model: str, words: list[str]):
    warnings = Teacher(TeacherConfig(model=model)).warnings(TODAY)
    assert len(warnings) == len(words)
    for warning, expected in zip(warnings, words, strict=True):
        assert expected in warning


def test_prices_come_from_the_user_the_profile_or_the_offline_table():
    usage = Usage(prompt_tokens=1_000_000, output_tokens=1_000_000)
    table = Teacher(TeacherConfig(model="o3-mini")).prices
    assert table.nano(usage) == round((1.10 + 4.40) * NANO)
    assert table.describe() == "$1.1 and $4.4 per million prompt and output tokens, by genai-prices"
    cached = Usage(prompt_tokens=1_000_000, output_tokens=1_000_000, cached_tokens=1_000_000)
    assert table.nano(cached) < table.nano(usage)
    half = Teacher(TeacherConfig(model="o3-mini", transport="batch")).prices
    assert half.nano(usage) == table.nano(usage) // 2
    mine = Teacher(TeacherConfig(model="o3-mini", input_price_usd=1.0, output_price_usd=0.3)).prices
    assert (mine.nano(usage), mine.source) == (round(1.3 * NANO), "the configuration")
    assert mine.nano(Usage(output_tokens=1)) == 300
    local = Teacher(TeacherConfig(base_url="http://localhost:1/v1", profile="local")).prices
    assert (local.nano(usage), local.source) == (5 * NANO, "profile local")
    unknown = Teacher(TeacherConfig(model="unheard-of")).prices
    assert (unknown.known, unknown.nano(usage), unknown.describe()) == (False, 0, "unknown")
    assert Prices(source="x", output_usd=0.0001).nano(Usage(output_tokens=1)) == 1  # never rounded to nothing


def test_every_shipped_profile_reads_and_the_series_is_priced():
    shipped = {profile.name: profile for profile in profiles.shipped()}
    assert shipped.keys() == {"deepseek", "local", "openai", "openrouter", "sglang", "vllm"}
    for name in ("o1", "o1-mini", "o1-preview", "o1-pro", "o3", "o3-mini", "o3-pro", "o4-mini", "gpt-5.6-sol"):
        teacher = Teacher(TeacherConfig(model=name))
        assert teacher.prices.known, name
        assert shipped["openai"].knows(name)
    assert Teacher(TeacherConfig(model="deepseek-reasoner", base_url="https://api.deepseek.com")).prices.known


def test_users_write_profiles_of_their_own(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text('[[models]]\nnames = ["m-*"]\nrefuses = ["top_p"]\nretires = 2026-12-01\n')
    teacher = Teacher(TeacherConfig(model="m-1", profile=str(path)))
    assert (teacher.profile.name, teacher.model.refuses) == ("mine", ("top_p",))
    for text, words in (
        ('[[models]]\nnmaes = ["x"]\n', "unknown fields"),
        ('[[models]]\nrefuses = ["seed"]\n', "found 'seed'"),
        ("[[models]]\ntransports = []\n", "transports"),
        ("models = 3", "found 3"),
        ("[[", "not a TOML file"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=words):
            Teacher(TeacherConfig(model="m-1", profile=str(path)))


def test_doctor_makes_one_call_and_says_what_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("SOME_KEY", "sk-good-key-0123456789")
    log = tmp_path / "log.jsonl"
    key = hashlib.sha256(b"sk-good-key-0123456789").hexdigest()
    with running_teacher(TeacherOptions(log=log, key_sha256=key)) as base_url:
        config = check.config_of("local-teacher", base_url, "SOME_KEY")
        check.check(config)
        monkeypatch.setenv("SOME_KEY", "sk-bad-key-0123456789")
        with pytest.raises(RunError, match="no answer: HTTP 401") as caught:
            check.check(config)
    assert "sk-bad" not in str(caught.value)
    printed = capsys.readouterr().out
    for words in (
        "answer         'I do not know",
        "reasoning      answer_only",
        "100000 requests",
        "models         listed",
    ):
        assert words in printed
    assert len(log.read_text().splitlines()) == 2
    with pytest.raises(UserError, match="no shipped profile knows a model 'unheard-of'"):
        check.config_of("unheard-of", None, None)
    assert check.config_of("deepseek-reasoner", None, None).api_key_env == "DEEPSEEK_API_KEY"
