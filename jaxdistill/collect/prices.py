"""What an answer costs: by the user's prices, the profile's, or the offline table of genai-prices."""

import dataclasses
import functools
import math
from decimal import Decimal
from typing import TYPE_CHECKING

import genai_prices

from jaxdistill.collect.profiles import Model, Profile
from jaxdistill.records import Usage

if TYPE_CHECKING:
    from jaxdistill.collect.teacher import TeacherConfig

NANO = 1_000_000_000  # money is counted in whole billionths of a dollar, so that sums are exact


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prices:
    """Prices of one model. Cost rounds up to the next billionth of a dollar."""

    source: str  # who says so; empty where nobody does
    input_usd: float = 0.0  # per million tokens
    output_usd: float = 0.0
    table: tuple[str, str] | None = None  # model and provider in genai-prices, which knows caches and tiers
    share: float = 1.0  # of the full price

    @classmethod
    def of(cls, config: "TeacherConfig", profile: Profile, model: Model, batch: bool) -> "Prices":
        """The prices of the first that has them: config, profile, genai-prices."""
        share = profile.batch_price if batch else 1.0
        for source, prices in (("the configuration", config), (f"profile {profile.name}", model)):
            if prices.input_price_usd is not None and prices.output_price_usd is not None:
                prompt, output = prices.input_price_usd, prices.output_price_usd
                return cls(source=source, input_usd=prompt, output_usd=output, share=share)
        if profile.genai_prices:
            prices = cls(source="genai-prices", table=(config.model, profile.genai_prices), share=share)
            try:
                prices.nano(Usage(prompt_tokens=1, output_tokens=1))
                return prices
            except LookupError:
                pass
        return cls(source="")

    @property
    def known(self) -> bool:
        """Whether anybody has a price."""
        return bool(self.source)

    @functools.lru_cache(maxsize=4096)  # noqa: B019  (a run has one price list)
    def nano(self, usage: Usage) -> int:
        """Billionths of a dollar that an answer costs; 0 where no price is known."""
        if self.table is None:
            usd = (
                Decimal(str(self.input_usd)) * usage.prompt_tokens + Decimal(str(self.output_usd)) * usage.output_tokens
            )
            usd /= 1_000_000
        else:
            tokens = genai_prices.Usage(
                input_tokens=usage.prompt_tokens,
                output_tokens=usage.output_tokens,
                cache_read_tokens=min(usage.cached_tokens, usage.prompt_tokens),
            )
            usd = genai_prices.calc_price(tokens, self.table[0], provider_id=self.table[1]).total_price
        return math.ceil(usd * Decimal(str(self.share)) * NANO)

    def describe(self) -> str:
        """The prices in words."""
        if not self.known:
            return "unknown"
        million = Usage(prompt_tokens=1_000_000), Usage(output_tokens=1_000_000)
        if self.table:
            million = Usage(prompt_tokens=1000), Usage(output_tokens=1000)  # below every tier
        scale = 1000 if self.table else 1
        prompt, output = (self.nano(usage) * scale / NANO for usage in million)
        return f"${prompt:g} and ${output:g} per million prompt and output tokens, by {self.source}"
