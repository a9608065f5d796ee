"""The same step by transformers and torch.compile: bfloat16 weights and moments, fused AdamW, flash attention."""

import dataclasses
import functools
import inspect
import json
import time
from typing import Any

import numpy as np
import shapes
import torch
import transformers
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface

_LOSS_TOKENS = 4096  # whose logits exist at once
_TIMED = 5


def main() -> None:
    options = shapes.parser(__doc__).parse_args()
    on_gpu = torch.cuda.is_available()
    case, attempts = shapes.case(options.model, options.row, options.memory_gib * shapes.GIB), []
    for recompute in (False, True):  # what torch keeps of all layers is tried first: it is the faster where it fits
        try:
            peer = _Peer(case, recompute, on_gpu)
            found = [peer.measure(documents) for documents in shapes.DOCUMENTS]
            break
        except torch.OutOfMemoryError as error:
            attempts.append(str(error).splitlines()[0])
            peer = None
            torch.cuda.empty_cache()
    else:
        raise SystemExit(f"out of memory: {attempts}")
    options.out.write_text(json.dumps(found))


def _packed(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **rest: Any) -> tuple[Any, None]:
    """Flash attention within documents, of [1, N, T, H]; torch has it without the package flash-attn."""
    from torch.nn.attention import varlen

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    bounds, longest = rest["bounds"], rest["longest"]
    known = inspect.signature(varlen.varlen_attn).parameters  # they differ between versions of torch
    ways: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "enable_gqa" in known:
        ways["enable_gqa"] = True
    else:
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    if "scale" in known:
        ways["scale"] = scaling  # 1 / sqrt(H), which is the default too
    out: Any = varlen.varlen_attn(q, k, v, bounds, bounds, longest, longest, **ways)
    return out[None], None


class _Peer:
    """A model, its optimizer and a compiled layer."""

    def __init__(self, case: shapes.Case, recompute: bool, on_gpu: bool):
        self.case, self.recompute, self.device = case, recompute, "cuda" if on_gpu else "cpu"
        self.attention = "packed flash (torch varlen)" if on_gpu else "sdpa"
        AttentionInterface.register("packed", _packed)
        AttentionMaskInterface.register("packed", lambda *arguments, **rest: None)
        config = transformers.AutoConfig.for_model(**case.hf())
        config._attn_implementation = "packed" if on_gpu else "sdpa"
        with torch.device(self.device):
            model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.train()
        for layer in model.model.layers:
            if on_gpu:
                layer.compile(dynamic=False)
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=on_gpu)

    def _step(self, row: dict[str, Any]) -> float:
        started = time.perf_counter()
        x = self.model.model(**row["inputs"], use_cache=False).last_hidden_state[0]
        head = self.model.lm_head.weight
        pieces = zip(x.split(_LOSS_TOKENS), row["targets"].split(_LOSS_TOKENS), strict=True)
        total = sum(checkpoint(_loss_sum, piece, head, targets, use_reentrant=False) for piece, targets in pieces)
        loss: Any = total / len(x)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        assert np.isfinite(float(loss.detach())), "the loss is not finite"  # waits for the step
        return time.perf_counter() - started

    def _row(self, documents: int) -> dict[str, Any]:
        row = shapes.row(self.case.architecture(), self.case.row_tokens, documents)
        put = functools.partial(torch.tensor, device=self.device)
        inputs = {"input_ids": put(row.tokens).long(), "position_ids": put(row.positions).long()}
        if self.device == "cuda":
            lengths = shapes.lengths(self.case.row_tokens, documents)
            bounds = put(np.cumsum([0, *lengths]), dtype=torch.int32)
            inputs |= {"bounds": bounds, "longest": self.case.row_tokens}
        return {"inputs": inputs, "targets": put(row.targets[0]).long()}

    def measure(self, documents: int) -> dict[str, Any]:
        """The median of some steps."""
        row, tokens = self._row(documents), self.case.row_tokens
        started = time.perf_counter()
        self._step(row)
        first_s = time.perf_counter() - started
        seconds = float(np.median([self._step(row) for _ in range(_TIMED)]))
        flops = self.case.architecture().flops_per_token(shapes.attended(tokens, documents))
        peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else 0
        return {
            **dataclasses.asdict(self.case),
            "remat": "layers" if self.recompute else "none",
            "attention": self.attention,
            "documents": documents,
            "seconds": seconds,
            "tokens_per_s": tokens / seconds,
            "tflops": flops * tokens / seconds / 1e12,
            "compile_s": first_s,
            "peak_gib": peak / shapes.GIB,
        }


def _loss_sum(x: Any, head: Any, targets: Any) -> Any:
    return functional.cross_entropy((x @ head.T).float(), targets, reduction="sum")


if __name__ == "__main__":
    main()
