"""The communication of a compiled program, counted in its HLO text with loops as often as they run."""

import dataclasses
import math
import re
from collections.abc import Iterator

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute", "ragged-all-to-all")

_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}  # others say their width: f32, s8, u4, f8e4m3fn
_SHAPE = re.compile(r"\b(pred|bf16|c64|c128|[fsu]\d+\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*)$")
_CALLED = re.compile(r"(?:to_apply|calls|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"?known_trip_count"?:\{"?n"?:"?(\d+)"?\}')
_CONSTANT = re.compile(r"%?([\w.\-]+) = s32\[\]\S* constant\((\d+)\)")
_BOUND = re.compile(r"ROOT .* compare\(%?[\w.\-]+, %?([\w.\-]+)\), direction=LT")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_IN_TWO_SIZES = ("all-gather", "reduce-scatter", "collective-permute")  # before and after, of one device
_CALLERS = ("call", "call-start", "conditional", "fusion", "async-start")
_REDUCE_SCATTER = "all-reduce-scatter"  # begins the names of fusions that TPUs run as a ring reduce-scatter


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of the program."""

    kind: str
    payload_bytes: int  # the whole array that is gathered, reduced or exchanged, on one device
    group: int  # devices that take part together
    dtype: str
    times: int  # in one run of the program

    @property
    def wire_bytes(self) -> float:
        """Sent by one device in one run, by the ring algorithms."""
        share = (self.group - 1) / self.group
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return self.times * self.payload_bytes * factor


def read(hlo: str) -> list[Collective]:
    """Every collective of an optimized HLO module's text, the text of `compiled.as_text()`.

    A loop whose number of rounds the text does not tell counts once: those are loops over keys, which hold none.
    """
    computations: dict[str, list[str]] = {}
    entry, current = "", ""
    for line in hlo.splitlines():
        if start := _COMPUTATION.match(line):
            current = start[2]
            computations[current] = []
            entry = current if start[1] else entry
        elif current and _INSTRUCTION.match(line):
            computations[current].append(line)
    return list(_walk(entry, 1, computations))


def _walk(
    name: str, times: int, computations: dict[str, list[str]], in_fusions: set[str] | None = None, fused: bool = False
) -> Iterator[Collective]:
    """The collectives of a computation and of those it calls.

    Args:
      in_fusions: channels met already in fusions of this loop. TPUs write one asynchronous collective down several
        times: in the fusion that starts it, in each that works beside it, and in the one that waits for its end.
        Outside of fusions a channel may be that of several collectives.
      fused: the computation is a fusion's.
    """
    met = set() if in_fusions is None else in_fusions
    for line in computations.get(name, ()):
        instruction = _INSTRUCTION.findall(line)[0]
        result, opcode = _split(instruction)
        kind = opcode.removesuffix("-start")
        if kind in KINDS:
            channel = _CHANNEL.search(instruction)
            if not (fused and channel and channel[1] in met):
                found = _collective(kind, result, instruction, times)
                if name.startswith(_REDUCE_SCATTER):  # written as an all-reduce of which a device keeps its part
                    found = dataclasses.replace(found, kind="reduce-scatter")
                yield found
            met |= {channel[1]} if fused and channel else set()
        elif opcode == "while":
            for called in _CALLED.findall(instruction):
                yield from _walk(called, times * _trips(instruction, computations), computations)
        elif opcode in _CALLERS:
            branches = [b.strip().lstrip("%") for group in _BRANCHES.findall(instruction) for b in group.split(",")]
            for called in _CALLED.findall(instruction) + branches:
                yield from _walk(called, times, computations, met, fused or opcode == "fusion")


def _trips(loop: str, computations: dict[str, list[str]]) -> int:
    """Rounds of a `while`: as the compiler says, or the constant its condition compares a counter from 0 with."""
    if known := _TRIPS.search(loop):
        return int(known[1])
    condition = "\n".join(computations.get(re.findall(r"condition=%?([\w.\-]+)", loop)[0], ()))
    bound = _BOUND.search(condition)
    return int(dict(_CONSTANT.findall(condition)).get(bound[1], 1)) if bound else 1


def _split(instruction: str) -> tuple[str, str]:
    """Result type and opcode: "(f32[2]{0}, s32[]) while(...)" -> ("(f32[2]{0}, s32[])", "while")."""
    depth, end = 0, len(instruction)
    for at, letter in enumerate(instruction):
        depth += (letter in "({[") - (letter in ")}]")
        if letter == " " and depth == 0:
            end = at
            break
    return instruction[:end], instruction[end + 1 :].split("(", 1)[0]


def _collective(kind: str, result: str, instruction: str, times: int) -> Collective:
    sizes = [(_bytes(dtype, dims), dtype) for dtype, dims in _SHAPE.findall(result)]
    payload, dtype = sum(size for size, _ in sizes), max(sizes)[1]
    if "-start(" in instruction and (result.startswith("((") or kind in _IN_TWO_SIZES):
        # The result of a start is (operands, results, ...), each a tuple if several are sent as one: whole arrays are
        # the larger of the two
        payload = max(sum(_bytes(*shape) for shape in _SHAPE.findall(part)) for part in _elements(result)[:2])
    group = _group_size(instruction)
    if kind == "reduce-scatter" and "-start(" not in instruction:
        payload *= group
    return Collective(kind, payload, group, dtype, times)


def _elements(tuple_type: str) -> list[str]:
    """The elements of a tuple's type: "((f32[2], s32[]), f32[4])" -> ["(f32[2], s32[])", "f32[4]"]."""
    depth, elements = 0, [""]
    for letter in tuple_type[1:-1]:
        depth += (letter in "({[") - (letter in ")}]")
        if letter == "," and depth == 0:
            elements.append("")
        else:
            elements[-1] += letter
    return elements


def _bytes(dtype: str, dims: str) -> int:
    bits = _BITS.get(dtype) or int(re.findall(r"\d+", dtype)[0])
    return math.prod(int(d) for d in dims.split(",") if d) * bits // 8


def _group_size(instruction: str) -> int:
    """Devices of one group. Spelled `{{0,1},{2,3}}`, `[2,4]<=[8]` (two groups of four) or `mesh['a'=4,'b'=2] {'a'}`."""
    if short := re.search(r"replica_groups=\[\d+,(\d+)\]", instruction):
        return int(short[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", instruction):
        return listed[1].count(",") + 1
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))? \{([^}]*)\}", instruction):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        # A part of an axis is 'a':(before)size
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part) if part else sizes[name] for name, part in axes)
    if "source_target_pairs" in instruction:
        return 2  # each device sends to one other
    raise ValueError(f"unknown form of replica_groups: {instruction[:400]}")
