"""Collectives counted in HLO: on real programs, compiled for eight simulated devices, with counts known by hand."""

import jax
import jax.numpy as jnp
import pytest
import tiny

from jaxdistill.plan import collectives
from jaxdistill.plan.collectives import Collective

N = 64


def compiled(f, *specs: jax.P) -> list[Collective]:
    with tiny.mesh(fsdp=8) as mesh:
        layouts = [jax.sharding.NamedSharding(mesh, spec) for spec in specs]
        arguments = [jax.ShapeDtypeStruct((N, N), jnp.float32, sharding=layout) for layout in layouts]
        return collectives.read(jax.jit(f).lower(*arguments).compile().as_text() or "")


def test_all_gather():
    [found] = compiled(lambda x: jax.sharding.reshard(x, jax.P()), jax.P("fsdp"))
    assert found == Collective("all-gather", N * N * 4, 8, "f32", 1)
    assert found.wire_bytes == N * N * 4 * 7 / 8


def test_reduce_scatter_or_its_cpu_spelling():
    """XLA for the CPU may keep an all-reduce and slice it; either way the whole matrix is reduced over eight."""

    def f(a, b):
        return jnp.einsum("ij,jk->ik", a, b, out_sharding=jax.P("fsdp"))

    found = compiled(f, jax.P(None, "fsdp"), jax.P("fsdp"))
    assert {(c.kind, c.payload_bytes, c.group) for c in found} <= {
        ("reduce-scatter", N * N * 4, 8),
        ("all-reduce", N * N * 4, 8),
    }
    assert len(found) == 1


def test_loops_count_as_often_as_they_run():
    def f(x):
        def layer(y, _):
            def inner(z, _):
                return jnp.tanh(jax.sharding.reshard(jax.sharding.reshard(z, jax.P()) @ x, jax.P("fsdp"))), None

            return jax.lax.scan(inner, y, length=3)[0], None

        return jax.lax.scan(layer, x, length=5)[0]

    found = [c for c in compiled(f, jax.P("fsdp")) if c.kind == "all-gather" and c.times > 1]
    assert {c.times for c in found} == {15}


# As XLA writes for GPUs: several small gathers in one, each start with its operands and its results
TEXT = """HloModule jit_step, is_scheduled=true

%async_computation (p: bf16[16,8]) -> bf16[128,8] {
  %p = bf16[16,8]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[128,8]{1,0:T(8,128)(2,1)} all-gather(%p), replica_groups=[4,8]<=[32], dimensions={0}
}

%body (arg: (s32[], bf16[16,8])) -> (s32[], bf16[16,8]) {
  %gather = ((bf16[16,8]), bf16[128,8], u32[]) async-start(%x), calls=%async_computation
  %done = bf16[128,8]{1,0} async-done(%gather), calls=%async_computation
  %scatter = f32[2,8]{1,0} reduce-scatter(%g), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %start = (f32[4]{0}, f32[32]{0}) all-gather-start(%y), replica_groups=mesh['x'=4,'y'=2,'z'=8] {'x','z':(1)2}
  ROOT %tuple = (s32[], bf16[16,8]) tuple(%i, %x)
}

%condition (arg: (s32[], bf16[16,8])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: bf16[16,8]) -> bf16[16,8] {
  %w = (s32[], bf16[16,8]) while(%i), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"80"}}
  %some = ((bf16[4,8]{1,0}, s8[2]{0}), (bf16[32,8]{1,0}, s8[16]{0})) all-gather-start(%p), replica_groups=[1,8]<=[8]
  %some-done = (bf16[32,8]{1,0}, s8[16]{0}) all-gather-done(%some)
  %parts = ((bf16[16,8]{0,1}), bf16[16,1]{0,1}) reduce-scatter-start(%p, %q), replica_groups={{0,1,2,3,4,5,6,7}}
  %sums = ((bf16[1176]{0}), bf16[1176]{0}) all-reduce-start(%r), replica_groups=mesh['data'=1,'fsdp'=8] {'fsdp'}
  %s = (f32[8]{0}, bf16[4]{0}) all-reduce(%a, %b), replica_groups=mesh['x'=8,'y'=4], device_ids=([4,8]T(1,0)) {'x','y'}
  %shift = bf16[4,4]{1,0} collective-permute(%c), channel_id=5, source_target_pairs={{0,1},{1,0}}
  ROOT %out = bf16[16,8]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_the_spellings_of_tpus_and_gpus():
    found = collectives.read(TEXT)
    assert found == [
        Collective("all-gather", 128 * 8 * 2, 8, "bf16", 80),
        Collective("reduce-scatter", 2 * 8 * 4 * 4, 4, "f32", 80),
        Collective("all-gather", 32 * 4, 8, "f32", 80),
        Collective("all-gather", 32 * 8 * 2 + 16, 8, "bf16", 1),
        Collective("reduce-scatter", 16 * 8 * 2, 8, "bf16", 1),
        Collective("all-reduce", 1176 * 2, 8, "bf16", 1),
        Collective("all-reduce", 8 * 4 + 4 * 2, 32, "f32", 1),
        Collective("collective-permute", 32, 2, "bf16", 1),
    ]
    assert found[6].wire_bytes == pytest.approx(40 * 2 * 31 / 32)
    assert found[7].wire_bytes == 32


def test_a_loop_tells_its_rounds_by_its_condition_and_an_asynchronous_collective_counts_once():
    """As libtpu writes them: no known_trip_count, and one channel in the fusions that start, overlap and end it."""
    gather = "bf16[64]{0} all-gather(%p), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}"
    reduce = "f32[16]{0} all-reduce(%p), channel_id=1, replica_groups=[1,8]<=[8], to_apply=%add"
    hlo = f"""
%start (p: bf16[8]) -> bf16[64] {{
  ROOT %g = {gather}
}}
%overlap (p: bf16[8]) -> bf16[64] {{
  ROOT %g.1 = {gather}
}}
%body (s: s32[]) -> s32[] {{
  %a = bf16[64]{{0}} fusion(%p), kind=kCustom, calls=%start
  %b = bf16[64]{{0}} fusion(%p), kind=kCustom, calls=%overlap
  %c = {reduce}
  %d = {reduce}
}}
%condition (s: s32[]) -> pred[] {{
  %n = s32[]{{:T(128)}} constant(28)
  %i = s32[]{{:T(128)}} get-tuple-element(%s), index=0
  ROOT %lt = pred[]{{:T(512)}} compare(%i, %n), direction=LT
}}
ENTRY %main (p: bf16[8]) -> s32[] {{
  %w = s32[] while(%s), condition=%condition, body=%body
}}
"""
    found = [(one.kind, one.payload_bytes, one.times) for one in collectives.read(hlo)]
    assert found == [("all-gather", 128, 28), ("all-reduce", 64, 28), ("all-reduce", 64, 28)]


def test_reduce_scatters_as_tpus_run_them():
    """On a SparseCore, as a call; and as a fusion of an all-reduce with the slice that a device keeps of it."""
    hlo = """
%all-reduce-scatter.2.clone (p: bf16[16,8]) -> bf16[4,8] {
  %all = bf16[16,8]{1,0} all-reduce(%p), channel_id=3, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %own = bf16[4,8]{1,0} dynamic-slice(%all, %i, %zero), dynamic_slice_sizes={4,8}
}
%called_computation (p: bf16[32], t: token[]) -> bf16[8] {
  ROOT %scatter = bf16[8]{0} reduce-scatter(%p), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%add
}, execution_thread="sparsecore"
ENTRY %main (p: bf16[32]) -> bf16[8] {
  %a = bf16[4,8]{1,0} fusion(%q), kind=kCustom, calls=%all-reduce-scatter.2.clone
  %b = ((bf16[32]{0}, token[]), bf16[8]{0}) call-start(%p, %t), to_apply=%called_computation
  ROOT %c = bf16[8]{0} call-done(%b)
}
"""
    found = [(one.kind, one.payload_bytes, one.group) for one in collectives.read(hlo)]
    assert found == [("reduce-scatter", 256, 4), ("reduce-scatter", 64, 4)]
