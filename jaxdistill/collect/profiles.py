"""Teacher profiles: what providers and their models take, cost and return, as TOML files that users can add to."""

import dataclasses
import datetime
import fnmatch
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from jaxdistill.errors import UserError
from jaxdistill.records import from_dict

Transport = Literal["chat", "responses", "background", "batch", "responses_batch"]
SHIPPED = Path(__file__).parent / "profiles"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """What a provider's model takes and returns; the defaults suit most OpenAI-compatible servers."""

    names: tuple[str, ...] = ("*",)  # shell patterns; the first model with a matching one counts
    transports: tuple[Transport, ...] = ("chat",)  # usable ones, the preferred first
    max_tokens_parameter: Literal["max_completion_tokens", "max_tokens"] = "max_completion_tokens"
    refuses: tuple[
        Literal["temperature", "top_p", "reasoning_effort"], ...
    ] = ()  # settings that it rejects: temperature, top_p, reasoning_effort
    system: Literal["system", "developer", "none"] = "system"  # role of system messages; none: it takes none
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # fields to send with every request
    summary: str | None = None  # of the reasoning, asked for through Responses: auto, concise or detailed
    reasoning: str = ""  # where the answer holds it: reasoning_content, reasoning, think tags, summary, hidden
    retires: datetime.date | None = None  # last day, as the provider announced it
    successor: str = ""
    input_price_usd: float | None = None  # USD per million tokens; None leaves it to genai-prices
    output_price_usd: float | None = None

    def __post_init__(self) -> None:
        if not self.transports or not self.names:
            raise UserError(f"a model of a profile has names {list(self.names)} and transports {list(self.transports)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """A provider."""

    name: str
    base_urls: tuple[str, ...] = ()  # where it is found; none for servers that people run themselves
    api_key_env: str = "OPENAI_API_KEY"
    genai_prices: str | None = None  # its id in genai-prices; None: no price is looked up
    batch_price: float = 0.5  # share of the price that a request in a batch costs
    terms: str = ""  # where its terms stand and what they say about training on outputs
    models: tuple[Model, ...] = (Model(),)

    def model(self, name: str) -> Model:
        """What is known of a model; the defaults where nothing is."""
        bare = name.rsplit("/", 1)[-1]  # OpenRouter and vLLM name models as owner/model
        for model in self.models:
            if any(fnmatch.fnmatchcase(n, pattern) for n in (name, bare) for pattern in model.names):
                return model
        return Model()

    def knows(self, name: str) -> bool:
        """Whether a model is named here by more than a pattern that matches everything."""
        return any(fnmatch.fnmatchcase(name, p) for m in self.models for p in m.names if p != "*")


def shipped() -> list[Profile]:
    """All profiles of collect/profiles."""
    return [_read(path) for path in sorted(SHIPPED.glob("*.toml"))]


def find(name: str | None, base_url: str) -> Profile:
    """The profile of that name or path; without one, that of the base URL, or a plain OpenAI-compatible server.

    Raises:
      UserError: no such profile, or it cannot be read.
    """
    if name is None:
        known = (p for p in shipped() if base_url.rstrip("/") in p.base_urls)
        return next(known, Profile(name="any OpenAI-compatible server"))
    path = SHIPPED / f"{name}.toml" if not name.endswith(".toml") else Path(name)
    if not path.is_file():
        names = [p.stem for p in sorted(SHIPPED.glob("*.toml"))]
        raise UserError(f"teacher.profile is {name!r}; expected one of {names}, or the path of a .toml file")
    return _read(path)


def _read(path: Path) -> Profile:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not a TOML file ({error})") from None
    return from_dict({"name": path.stem, **values}, Profile, where=str(path))
