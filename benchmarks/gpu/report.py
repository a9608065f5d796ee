"""gpu.md: what was measured on a GPU, with the formulas, and what was skipped and why."""

from collections.abc import Iterable, Mapping
from typing import Any

import profile_steps
import shapes

from jaxdistill.chips import CHIPS

_PEAK = CHIPS["h100"].bf16_flops / 1e12
FORMULAS = f"""
- FLOPs per token = 6 x matmul weights (head included, embedding lookup not) + 6 x layers x heads x head_dim x document
  length, the length averaged over the row's tokens: attention is counted causally, recomputation not at all.
- MFU = FLOPs per token x tokens/s / {_PEAK:.1f} TFLOP/s (H100 SXM, dense bfloat16); "of product" divides by the fastest
  bfloat16 matrix product measured in the same call instead.
- Seconds are the median of five optimizer steps of one row, after one that is not counted; both sides keep weights and
  moments in bfloat16 (ours rounds stochastically), clip gradients by their norm and update with AdamW.
- A decoding step at batch 64 has to read the layers' and the head's weights and all keys and values of the contexts,
  once; roofline = those bytes / (the copy measured in the same call), share = roofline / the step's seconds.
- Attention's rate counts 3.5 x 2 x heads x head_dim x length^2 FLOPs a document, forward and backward pass together.
"""


def markdown(found: Mapping[str, Any]) -> str:
    """The report; what is not there yet is left out."""
    results = found["results"]
    environment = found["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    lines = [
        "# One GPU",
        "",
        f"`benchmarks/gpu.sh` at commit {environment['commit']}: {environment['device']},",
        f"Python {environment['python']}, {versions}.",
        FORMULAS,
    ]
    if attention := results.get("attention"):
        lines += ["## Attention against the blockwise reference in float32", "", *_attention(attention), ""]
    peak = results.get("peak")
    if peak:
        lines += [
            f"Fastest matrix product: {peak['matmul_tflops']:.0f} TFLOP/s.",
            f"Copy within the device's memory: {peak['copy_tb_per_s']:.2f} TB/s, read and written.",
            "",
        ]
    decoding = [one for name, some in results.items() if name.startswith("decode ") for one in some]
    if decoding:
        lines += ["## Decoding", "", *_decoding(decoding, peak), ""]
    steps = [one for name, some in results.items() if name.startswith("step ") for one in some]
    peers = [one for name, some in results.items() if name.startswith("peer ") for one in some]
    if steps or peers:
        lines += ["## Training steps", "", *_steps(steps, peers, peak), ""]
    for one in steps:
        if "profile" in one:
            lines += [f"## Where a step goes: {_shape(one)}", "", *_profile(one, peak), ""]
    if found["skipped"]:
        lines += ["## Skipped", "", *(f"- {name}: {reason}" for name, reason in found["skipped"].items()), ""]
    return "\n".join(lines)


def _attention(found: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    yield "| what | relative error: output, dq, dk, dv | the same bits twice |"
    yield "|---|---|---|"
    timed = []
    for one in found:
        if "check" in one:
            errors = ", ".join(f"{error:.1e}" for error in one["errors"].values())
            yield f"| {one['check']} | {errors} | {'yes' if one['repeats_bitwise'] else 'no'} |"
        else:
            timed.append(one)
    if timed:
        yield ""
        yield "| kernel | row | documents | forward and backward, ms | TFLOP/s |"
        yield "|---|---|---|---|---|"
    for one in timed:
        row = f"{one['tokens']:,} | {one['documents']} | {one['seconds'] * 1e3:.2f} | {one['tflops']:.0f}"
        yield f"| {one['kernel']} | {row} |"


def _decoding(found: Iterable[Mapping[str, Any]], peak: Mapping[str, Any] | None) -> Iterable[str]:
    yield (
        "| model | contexts | cache read by | ms a step | tokens/s | GB a step | share of roofline | a row alone | "
        "first tokens as by XLA |"
    )
    yield "|" + "---|" * 9
    for one in found:
        total = one["weight_bytes"] + one["cache_bytes"]
        share = f"{total / (peak['copy_tb_per_s'] * 1e12) / one['seconds']:.1%}" if peak else ""
        yield (
            f"| {one['model']} | {one['slots']} x {one['context']:,} | {one['kernel']} | {one['seconds'] * 1e3:.2f} | "
            f"{one['slots'] / one['seconds']:,.0f} | {total / 1e9:.1f} | {share} | "
            f"{'says the same' if one['alone_says_the_same'] else 'differs'} | {one['first_tokens_as_xla']:.0%} |"
        )


def _steps(steps: list[dict[str, Any]], peers: list[dict[str, Any]], peak: Mapping[str, Any] | None) -> Iterable[str]:
    ours, theirs = ({_key(one): one for one in some} for some in (steps, peers))
    yield (
        "| model | layers | row | documents | remat | tokens/s | TFLOP/s | MFU | of product | GiB, planned | "
        "transformers: tokens/s, MFU, GiB | ratio |"
    )
    yield "|" + "---|" * 12
    for key in ours | theirs:
        step, peer = ours.get(key), theirs.get(key)
        any_of = step or peer
        assert any_of is not None
        cells = [any_of["model"], any_of["layers"], f"{any_of['row_tokens']:,}", any_of["documents"]]
        if step:
            share = f"{step['tflops'] / peak['matmul_tflops']:.1%}" if peak else ""
            cells += [step["remat"], f"{step['tokens_per_s']:,.0f}", f"{step['tflops']:.1f}", _mfu(step), share]
            cells += [f"{step['peak_gib']:.1f}, {step['planned_gib']:.1f}"]
        else:
            cells += [""] * 6
        cells += [f"{peer['tokens_per_s']:,.0f}, {_mfu(peer)}, {peer['peak_gib']:.1f}" if peer else ""]
        cells += [f"{step['tokens_per_s'] / peer['tokens_per_s']:.2f}" if step and peer else ""]
        yield "| " + " | ".join(map(str, cells)) + " |"


def _key(one: Mapping[str, Any]) -> tuple[Any, ...]:
    return one["model"], one["layers"], one["row_tokens"], one["documents"]


def _shape(one: Mapping[str, Any]) -> str:
    return f"{one['model']}, {one['layers']} layers, {one['row_tokens']:,} tokens, {one['documents']} documents"


def _mfu(one: Mapping[str, Any]) -> str:
    return f"{one['tflops'] / _PEAK:.1%}"


def _profile(step: dict[str, Any], peak: Mapping[str, Any] | None) -> Iterable[str]:
    profile = step["profile"]
    case = shapes.Case(step["model"], step["row_tokens"], step["layers"], step["remat"])
    c, tokens = case.architecture(), step["row_tokens"]
    attention = 3 * c.forward_attention_flops(shapes.attended(tokens, step["documents"])) * tokens
    rate = (peak["matmul_tflops"] if peak else _PEAK) * 1e12
    ideal = {"matrix products": 6 * sum(c.matmul_weights) * tokens / rate, "attention": attention / rate}
    lost = profile_steps.losses(profile, ideal)[:3]
    yield f"{profile['step_s']:.3f} s a step, kernels {profile['busy_s']:.3f} s. The three largest losses, against "
    yield f"matrix products and attention at {rate / 1e12:.0f} TFLOP/s and nothing else:"
    yield ""
    for number, (kind, seconds) in enumerate(lost, start=1):
        yield f"{number}. {kind}: {seconds:.3f} s, {seconds / profile['step_s']:.1%}"
    yield ""
    yield "| kernel | ms |"
    yield "|---|---|"
    yield from (f"| `{name}` | {seconds * 1e3:.1f} |" for name, seconds in profile["largest"])
