"""Collectives as they are read from compiled programs."""

import jax

from llava_jax.config import MeshConfig
from llava_jax.planning.collectives import Traffic, read_collectives
from llava_jax.sharding import make_mesh

# As TPU's compiler writes it: a gather spread over two fusions of a loop, whose length is in its condition.
TPU_HLO = """\
HloModule jit_step, is_scheduled=true

%start (param_0: bf16[1,64,256]) -> (bf16[1,64,256], bf16[1,512,256]) {
  %param_0 = bf16[1,64,256]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.1 = bf16[1,512,256]{2,1,0} all-gather(%param_0), channel_id=83, frontend_attributes={chain_id="7"}
  ROOT %custom-call.78 = (bf16[1,64,256]{2,1,0}, bf16[1,512,256]{2,1,0}) custom-call(%all-gather.1)
}

%done (param_0.1: bf16[1,64,256]) -> bf16[1,512,256] {
  %param_0.1 = bf16[1,64,256]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %all-gather.2 = bf16[1,512,256]{2,1,0} all-gather(%param_0.1), channel_id=83, frontend_attributes={chain_id="7"}
}

%body (p: (s32[], bf16[1,64,256])) -> (s32[], bf16[1,64,256]) {
  %p = (s32[]{:T(128)}, bf16[1,64,256]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %x = bf16[1,64,256]{2,1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %f1 = (bf16[1,64,256]{2,1,0}, bf16[1,512,256]{2,1,0}) fusion(%x), kind=kCustom, calls=%start
  %f2 = bf16[1,512,256]{2,1,0} fusion(%x), kind=kCustom, calls=%done
  ROOT %t = (s32[]{:T(128)}, bf16[1,64,256]{2,1,0:T(8,128)(2,1)}) tuple(%p, %x)
}

%condition (q: (s32[], bf16[1,64,256])) -> pred[] {
  %constant.5 = s32[]{:T(128)} constant(32)
  %q = (s32[]{:T(128)}, bf16[1,64,256]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%q), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %constant.5), direction=LT
}

%chunk (r: (s32[], s32[], f32[64,512])) -> (s32[], s32[], f32[64,512]) {
  %r = (s32[]{:T(128)}, s32[]{:T(128)}, f32[64,512]{1,0:T(8,128)}) parameter(0)
  %g = f32[64,512]{1,0:T(8,128)} get-tuple-element(%r), index=2
  %all-reduce.9 = f32[64,512]{1,0:T(8,128)} all-reduce(%g), channel_id=16, to_apply=%add
  ROOT %t.1 = (s32[]{:T(128)}, s32[]{:T(128)}, f32[64,512]{1,0:T(8,128)}) tuple(%r, %r, %all-reduce.9)
}

%more (s: (s32[], s32[], f32[64,512])) -> pred[] {
  %s = (s32[]{:T(128)}, s32[]{:T(128)}, f32[64,512]{1,0:T(8,128)}) parameter(0)
  %limit = s32[]{:T(128)} get-tuple-element(%s), index=1
  %j = s32[]{:T(128)} get-tuple-element(%s), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%j, %limit), direction=LT
}

ENTRY %main (a: bf16[1,64,256], b: f32[64,512]) -> f32[64,512] {
  %a = bf16[1,64,256]{2,1,0:T(8,128)(2,1)} parameter(0)
  %b = f32[64,512]{1,0:T(8,128)} parameter(1)
  %w = (s32[]{:T(128)}, bf16[1,64,256]{2,1,0:T(8,128)(2,1)}) while(%a), condition=%condition, body=%body
  %v = (s32[]{:T(128)}, s32[]{:T(128)}, f32[64,512]{1,0:T(8,128)}) while(%b), condition=%more, body=%chunk
  ROOT %out = f32[64,512]{1,0:T(8,128)} get-tuple-element(%v), index=2
}
"""


# As TPU's compiler multiplies by what it gathers from its neighbours: a loop within a layer, unrolled twice, in which a
# gather that the layer began goes on.
WINDOWED_HLO = """\
HloModule jit_step, is_scheduled=true

%start (param_0: bf16[64,256]) -> (bf16[64,256], bf16[512,256]) {
  %param_0 = bf16[64,256]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[512,256]{1,0} all-gather(%param_0), channel_id=83, frontend_attributes={chain_id="0"}
}

%go_on (param_1: bf16[64,256]) -> bf16[512,256] {
  %param_1 = bf16[64,256]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[512,256]{1,0} all-gather(%param_1), channel_id=83, frontend_attributes={chain_id="0"}
}

%turn (p: (bf16[64,256], u32[])) -> (bf16[64,256], u32[]) {
  %p = (bf16[64,256]{1,0}, u32[]) parameter(0)
  %x = bf16[64,256]{1,0} get-tuple-element(%p), index=0
  %i = u32[] get-tuple-element(%p), index=1
  %two = u32[] constant(2)
  %f2 = bf16[512,256]{1,0} fusion(%x), kind=kCustom, calls=%go_on
  %s1 = (bf16[64,256]{1,0}, bf16[64,256]{1,0}, u32[], u32[]) collective-permute-start(%x), channel_id=65
  %d1 = bf16[64,256]{1,0} collective-permute-done(%s1)
  %s2 = (bf16[64,256]{1,0}, bf16[64,256]{1,0}, u32[], u32[]) collective-permute-start(%d1), channel_id=66
  %d2 = bf16[64,256]{1,0} collective-permute-done(%s2)
  %next = u32[] add(%i, %two)
  ROOT %t = (bf16[64,256]{1,0}, u32[]) tuple(%d2, %next)
}

%goes_on (q: (bf16[64,256], u32[])) -> pred[] {
  %eight = u32[] constant(8)
  %q = (bf16[64,256]{1,0}, u32[]) parameter(0)
  %j = u32[] get-tuple-element(%q), index=1
  ROOT %lt = pred[] compare(%j, %eight), direction=LT
}

%layer (r: (s32[], bf16[64,256])) -> (s32[], bf16[64,256]) {
  %r = (s32[], bf16[64,256]{1,0}) parameter(0)
  %y = bf16[64,256]{1,0} get-tuple-element(%r), index=1
  %f1 = (bf16[64,256]{1,0}, bf16[512,256]{1,0}) fusion(%y), kind=kCustom, calls=%start
  %w = (bf16[64,256]{1,0}, u32[]) while(%y), condition=%goes_on, body=%turn
  ROOT %t.1 = (s32[], bf16[64,256]{1,0}) tuple(%r, %y)
}

%less (s: (s32[], bf16[64,256])) -> pred[] {
  %s = (s32[], bf16[64,256]{1,0}) parameter(0)
  ROOT %fused = pred[] fusion(%s), kind=kLoop, calls=%compare
}

ENTRY %main (a: bf16[64,256]) -> bf16[64,256] {
  %a = bf16[64,256]{1,0} parameter(0)
  %v = (s32[], bf16[64,256]{1,0}) while(%a), condition=%less, body=%layer, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %out = bf16[64,256]{1,0} get-tuple-element(%v), index=1
}
"""


# As TPU's compiler writes the sums of gradients that shard_map asks for: all of them on channel 1.
SUMS_HLO = """\
HloModule jit_step, is_scheduled=true

%all-reduce-scatter.7 (p.1: bf16[512,512]) -> bf16[128,512] {
  %p.1 = bf16[512,512]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.50 = bf16[512,512]{1,0:T(8,128)(2,1)} all-reduce(%p.1), channel_id=1, to_apply=%add
  ROOT %slice.1 = bf16[128,512]{1,0:T(8,128)(2,1)} slice(%all-reduce.50), slice={[0:128], [0:512]}
}

%all-reduce-scatter.8 (p.2: bf16[512,512]) -> bf16[128,512] {
  %p.2 = bf16[512,512]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.51 = bf16[512,512]{1,0:T(8,128)(2,1)} all-reduce(%p.2), channel_id=1, to_apply=%add
  ROOT %slice.2 = bf16[128,512]{1,0:T(8,128)(2,1)} slice(%all-reduce.51), slice={[0:128], [0:512]}
}

ENTRY %main (a: bf16[512,512], b: bf16[512,512]) -> bf16[128,512] {
  %a = bf16[512,512]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[512,512]{1,0:T(8,128)(2,1)} parameter(1)
  %f = bf16[128,512]{1,0:T(8,128)(2,1)} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.7
  %all-reduce.52 = bf16[128,512]{1,0:T(8,128)(2,1)} all-reduce(%f), channel_id=1, to_apply=%add
  %g = bf16[128,512]{1,0:T(8,128)(2,1)} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.8
  ROOT %sum = bf16[128,512]{1,0:T(8,128)(2,1)} add(%all-reduce.52, %g)
}
"""


# As the GPU compiler writes it.
GPU_HLO = """\
HloModule jit_step

%layer (p: (s32[], f32[1024])) -> (s32[], f32[1024]) {
  %p = (s32[], f32[1024]{0}) parameter(0)
  %g = f32[1024]{0} get-tuple-element(%p), index=1
  %rs = ((f32[1024]{0}), f32[128]{0}) reduce-scatter-start(%g), channel_id=4, dimensions={0}, to_apply=%add
  %rsd = f32[128]{0} reduce-scatter-done(%rs)
  %ag = (f32[128]{0}, f32[1024]{0}) all-gather-start(%rsd), channel_id=5, dimensions={0}
  %agd = f32[1024]{0} all-gather-done(%ag)
  %ar = f32[1024]{0} all-reduce-start(%agd), channel_id=6, to_apply=%add
  ROOT %t = (s32[], f32[1024]{0}) tuple(%p, %agd)
}

%less (q: (s32[], f32[1024])) -> pred[] {
  %q = (s32[], f32[1024]{0}) parameter(0)
  ROOT %fused = pred[] fusion(%q), kind=kLoop, calls=%compare
}

ENTRY %main (a: f32[1024]) -> f32[1024] {
  %a = f32[1024]{0} parameter(0)
  %w = (s32[], f32[1024]{0}) while(%a), condition=%less, body=%layer, backend_config={"known_trip_count":{"n":"7"}}
  ROOT %out = f32[1024]{0} get-tuple-element(%w), index=1
}
"""


def test_tpu_collectives_are_counted_once_per_turn_of_their_loop():
    traffic, num_uncertain = read_collectives(TPU_HLO)
    assert traffic == {
        "all-gather": Traffic(32, 32 * 512 * 256 * 2),
        "all-reduce": Traffic(1, 64 * 512 * 4),
    }
    assert num_uncertain == 1  # nobody but the data knows how often the second loop turns


def test_loops_that_gather_from_neighbours_turn_as_often_as_their_counter_grows():
    traffic, num_uncertain = read_collectives(WINDOWED_HLO)
    assert traffic == {
        "all-gather": Traffic(3, 3 * 512 * 256 * 2),
        "collective-permute": Traffic(3 * 4 * 2, 3 * 4 * 2 * 64 * 256 * 2),
    }
    assert num_uncertain == 0


def test_gpu_collectives_count_what_is_whole_before_or_after():
    traffic, num_uncertain = read_collectives(GPU_HLO)
    assert traffic == {kind: Traffic(7, 7 * 4096) for kind in ("all-gather", "all-reduce", "reduce-scatter")}
    assert num_uncertain == 0


def test_sums_on_one_channel_are_counted_one_by_one():
    traffic, num_uncertain = read_collectives(SUMS_HLO)
    assert traffic == {"all-reduce": Traffic(3, (512 + 512 + 128) * 512 * 2)}
    assert num_uncertain == 0


def test_collectives_of_a_program_compiled_here_are_those_that_were_asked_for():
    mesh = make_mesh(MeshConfig(1, 8, 1))
    axis = mesh.axis_names[1]
    rows = jax.NamedSharding(mesh, jax.P(axis))

    def sums(x):
        def add(i, total):
            first = jax.lax.psum(x * i, axis)
            return total + first + jax.lax.psum(jax.numpy.sin(first[:, :3]), axis).sum()

        return jax.lax.fori_loop(0, 5, add, jax.numpy.zeros_like(x))

    f = jax.shard_map(sums, mesh=mesh, in_specs=rows.spec, out_specs=rows.spec, check_vma=False)
    hlo = jax.jit(f).lower(jax.ShapeDtypeStruct((8, 32), "float32", sharding=rows)).compile().as_text()
    assert hlo.count(" all-reduce(") == hlo.count("channel_id=1,") == 2
    assert read_collectives(hlo) == ({"all-reduce": Traffic(2 * 5, 5 * (32 + 3) * 4)}, 0)
