"""Reading a scheduled module's text: shapes, groups, work, and the timeline made of it."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from moe_ep.aot.collectives import replica_groups, scope_of
from moe_ep.aot.estimates import make_estimates
from moe_ep.aot.hlo import parse, trip_count
from moe_ep.aot.schedule import data_dependent_loops, read_schedule
from moe_ep.aot.timeline import Estimates, walk
from moe_ep.aot.work import Gemm, work_of
from moe_ep.config import ClusterConfig

# A loop of three passes: an all-to-all over 16 GPUs stands over one of two products.
MODULE = """HloModule step, is_scheduled=true

%body (p: (s32[], bf16[16,4,8], f32[3,8,8])) -> (s32[], bf16[16,4,8], f32[3,8,8]) {
  %p = (s32[], bf16[16,4,8]{2,1,0}, f32[3,8,8]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %rows = bf16[16,4,8]{2,1,0} get-tuple-element(%p), index=1
  %w = f32[3,8,8]{2,1,0} get-tuple-element(%p), index=2
  %start = ((bf16[16,4,8]{2,1,0}), bf16[16,4,8]{2,1,0}) all-to-all-start(%rows), replica_groups={{0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15}}, dimensions={0}, metadata={op_name="jit(step)/while/body/moe/dispatch/all_to_all"}
  %slice = f32[8,8]{1,0} bitcast(%w)
  %product = f32[8,8]{1,0} dot(%slice, %slice), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="jit(step)/while/body/attention/dot_general"}
  %done = bf16[16,4,8]{2,1,0} all-to-all-done(%start)
  %second = f32[8,8]{1,0} dot(%product, %product), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (s32[], bf16[16,4,8]{2,1,0}, f32[3,8,8]{2,1,0}) tuple(%i, %done, %w)
}

%condition (p.1: (s32[], bf16[16,4,8], f32[3,8,8])) -> pred[] {
  %p.1 = (s32[], bf16[16,4,8]{2,1,0}, f32[3,8,8]{2,1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %limit = s32[] constant(3)
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (a: (s32[], bf16[16,4,8], f32[3,8,8])) -> (s32[], bf16[16,4,8], f32[3,8,8]) {
  %a = (s32[], bf16[16,4,8]{2,1,0}, f32[3,8,8]{2,1,0}) parameter(0)
  ROOT %loop = (s32[], bf16[16,4,8]{2,1,0}, f32[3,8,8]{2,1,0}) while(%a), condition=%condition, body=%body
}
"""


def small_schedule():
    return read_schedule(parse(MODULE), ClusterConfig(), gpus=16, program="prefill", tokens_per_gpu=64)


def test_instructions_shapes_and_trips():
    module = parse(MODULE)
    assert trip_count(module, module.entry.root) == 3
    body = module.computations["body"]
    assert body.by_name["rows"].bytes == 16 * 4 * 8 * 2
    assert [shape.dimensions for shape in body.by_name["t"].shapes] == [(), (16, 4, 8), (3, 8, 8)]
    assert body.by_name["t"].operands == ("i", "done", "w")


def test_a_loop_whose_passes_depend_on_data_is_counted_once_and_marked():
    unknown = parse(MODULE.replace("constant(3)", "get-tuple-element(%p.1), index=0"))
    assert trip_count(unknown, unknown.entry.root) is None
    schedule = read_schedule(unknown, ClusterConfig(), gpus=16, program="prefill", tokens_per_gpu=64)
    assert data_dependent_loops(schedule) == 1
    assert walk(schedule, Estimates(lambda _: 1.0, lambda _: 0.5)).step_s == 2.0


def test_a_collectives_bytes_are_split_by_link_and_its_scope_is_the_programs():
    start, product, done, second = small_schedule()["computations"]["body"]
    assert (start["op"], start["scope"], start["group_size"]) == ("all_to_all", "moe/dispatch", 16)
    assert start["bytes"] == 1024
    # 15 of 16 parts leave the GPU, 8 of them the node of 8.
    assert (start["sent_same_node_bytes"], start["sent_other_node_bytes"]) == pytest.approx((7 * 64, 8 * 64))
    assert product["gemms"] == [[8, 8, 8, 1]]
    assert (product["op"], product["flops"], product["scope"]) == ("gemm", 2 * 8**3, "attention")
    assert (done["start"], second["kind"]) == ("start", "compute")


@pytest.mark.parametrize(("network_s", "exposed_s", "step_s"), [(3.0, 3 * 2.0, 12.0), (0.5, 0.0, 6.0)])
def test_what_a_done_waits_for_is_exposed(network_s, exposed_s, step_s):
    timeline = walk(small_schedule(), Estimates(lambda _: 1.0, lambda _: network_s))
    (transfer,) = timeline.transfers
    assert transfer.count == 3
    assert transfer.exposed_s == exposed_s
    assert timeline.step_s == step_s
    assert timeline.hidden_share() == pytest.approx(1.0 - exposed_s / (3 * network_s))
    assert [work.name for work in transfer.covered_by] == ["product"]


def scheduled(*entries):
    return {"entry": "main", "computations": {"main": list(entries)}}


def transfer_entry(kind, name, scope):
    same = {"op": "all_to_all", "backward": False, "groups": 1, "group_size": 16}
    return {"kind": kind, "name": name, "scope": scope, "sent_same_node_bytes": 0, "sent_other_node_bytes": 1, **same}


def test_a_wait_is_charged_to_what_the_network_carries_meanwhile():
    schedule = scheduled(
        transfer_entry("collective_start", "rows", "moe/dispatch"),
        transfer_entry("collective_start", "counts", "moe/counts"),
        {"kind": "compute", "name": "gemm", "op": "gemm", "scope": ""},
        {"kind": "collective_done", "name": "counts.done", "start": "counts"},
        {"kind": "collective_done", "name": "rows.done", "start": "rows"},
    )
    timeline = walk(schedule, Estimates(lambda _: 1.0, lambda entry: 4.0 if entry["name"] == "rows" else 0.5))
    # Compute ends at 1, rows at 4 and, behind them, the counts at 4.5.
    assert {t.name: t.exposed_s for t in timeline.transfers} == {"rows": 3.0, "counts": 0.5}
    assert timeline.step_s == 4.5
    assert timeline.hidden_share() == 0.25


def test_only_the_first_pass_of_a_loop_waits_for_what_was_sent_before_it():
    schedule = scheduled(
        transfer_entry("collective_start", "sums", "sum_gradients"),
        {"kind": "loop", "name": "layers", "body": "body", "trip_count": 3},
        {"kind": "collective_done", "name": "sums.done", "start": "sums"},
    )
    schedule["computations"]["body"] = [
        transfer_entry("collective_start", "rows", "moe/dispatch"),
        {"kind": "compute", "name": "gemm", "op": "gemm", "scope": ""},
        {"kind": "collective_done", "name": "rows.done", "start": "rows"},
    ]
    timeline = walk(schedule, Estimates(lambda _: 2.0, lambda entry: 10.0 if entry["name"] == "sums" else 1.0))
    # Rows go out behind the sums, from 10 to 11, in the first pass; then two passes of 2.
    assert timeline.step_s == 11.0 + 2 * 2.0
    assert {t.name: (t.count, t.exposed_s) for t in timeline.transfers} == {"sums": (1, 8.0), "rows": (3, 1.0)}


def layer(*work_s, exchange_s):
    """A timeline of two layers whose bodies hold two exchanges and (scope, seconds) of work, all in a row."""
    body = [transfer_entry("collective", name, f"moe/{name}") for name in ("dispatch", "combine")]
    body += [{"kind": "compute", "name": scope, "op": "gemm", "scope": scope, "s": s} for scope, s in work_s]
    schedule = scheduled({"kind": "loop", "name": "layers", "body": "body", "trip_count": 2})
    schedule["computations"]["body"] = body
    return walk(schedule, Estimates(lambda entry: entry["s"], lambda _: exchange_s))


@pytest.mark.parametrize(("exchange_s", "bound"), [(1.0, 1.0), (2.0, 0.75), (8.0, 5 / 16)])
def test_the_bound_gives_experts_and_the_rest_half_of_the_exchange_each(exchange_s, bound):
    work = ("attention", 0.5), ("moe/router", 0.5), ("moe/experts", 3.0), ("moe/expert_rows/gather_rows", 1.0)
    timeline = layer(*work, exchange_s=exchange_s)
    assert timeline.bound() == pytest.approx(bound)
    assert timeline.hidden_share() == 0


SECONDS = st.sampled_from([0.25, 1.0, 3.0])
# One entry of a computation: (compute, scope, seconds), (start, scope, seconds), (done, which), or a loop.
ENTRIES = st.lists(
    st.one_of(
        st.tuples(st.just("compute"), st.sampled_from(["attention", "moe/experts", ""]), SECONDS),
        st.tuples(st.sampled_from(["collective_start", "collective"]), st.sampled_from(["moe/dispatch", "counts"]), SECONDS),
        st.tuples(st.just("collective_done"), st.integers(0, 3)),
        st.tuples(st.just("loop"), st.integers(0, 3)),
    ),
    max_size=10,
)


def computation(entries, name):
    """Returns the entries as a schedule has them, every start followed by its done."""
    made, flying = [], []
    for index, (kind, *details) in enumerate(entries):
        if kind == "compute":
            made.append({"kind": kind, "name": str(index), "op": "gemm", "scope": details[0], "s": details[1]})
        elif kind.startswith("collective_done"):
            start = flying.pop(details[0] % len(flying)) if flying else None
            made += [{"kind": kind, "name": f"{start}.done", "start": start}] if start else []
        elif kind == "loop":
            made += [{"kind": kind, "name": str(index), "body": "body", "trip_count": details[0]}] if name == "main" else []
        else:
            made.append(transfer_entry(kind, f"{name}.{index}", details[0]) | {"s": details[1]})
            flying += [f"{name}.{index}"] if kind == "collective_start" else []
    return made + [{"kind": "collective_done", "name": f"{start}.done", "start": start} for start in flying]


@hypothesis.given(main=ENTRIES, body=ENTRIES)
@hypothesis.settings(max_examples=200, deadline=None)
def test_no_schedule_hides_more_than_its_bound(main, body):
    schedule = scheduled(*computation(main, "main"))
    schedule["computations"]["body"] = computation(body, "body")
    timeline = walk(schedule, Estimates(lambda entry: entry["s"], lambda entry: entry["s"]))
    assert timeline.hidden_share() <= timeline.bound() + 1e-9


KERNELS = """HloModule kernels, is_scheduled=true

%rows_in_place (p.0: bf16[100,8], p.1: s32[4,1], p.2: bf16[4,8]) -> bf16[100,8] {
  %p.0 = bf16[100,8]{1,0} parameter(0)
  %p.1 = s32[4,1]{1,0} parameter(1)
  %p.2 = bf16[4,8]{1,0} parameter(2)
  ROOT %scatter = bf16[100,8]{1,0} scatter(%p.0, %p.1, %p.2), to_apply=%add
}

%on_a_slice (q.0: bf16[64,32], q.1: bf16[2,4,16,32]) -> bf16[64,16] {
  %q.0 = bf16[64,32]{1,0} parameter(0)
  %q.1 = bf16[2,4,16,32]{3,2,1,0} parameter(1)
  %layer = bf16[1,4,16,32]{3,2,1,0} slice(%q.1), slice={[0:1], [0:4], [0:16], [0:32]}
  %cut = bf16[4,16,32]{2,1,0} bitcast(%layer)
  ROOT %kernel = bf16[64,16]{1,0} custom-call(%q.0, %cut), custom_call_target="mosaic_gpu_v2"
}

%half_of_a_layer (r.0: bf16[2,4,16,32]) -> bf16[4,16,8] {
  %r.0 = bf16[2,4,16,32]{3,2,1,0} parameter(0)
  %r.layer = bf16[1,4,16,32]{3,2,1,0} slice(%r.0), slice={[0:1], [0:4], [0:16], [0:32]}
  %r.cut = bf16[4,16,32]{2,1,0} bitcast(%r.layer)
  ROOT %r.half = bf16[4,16,8]{2,1,0} slice(%r.cut), slice={[0:4], [0:16], [0:8]}
}

ENTRY %main (x: bf16[64,16], d: bf16[64,32], w: bf16[4,16,32], g: bf16[4,16,32], c: bf16[100,8], i: s32[4,1], u: bf16[4,8], s: bf16[2,4,16,32]) -> bf16[64,32] {
  %x = bf16[64,16]{1,0} parameter(0)
  %d = bf16[64,32]{1,0} parameter(1)
  %w = bf16[4,16,32]{2,1,0} parameter(2)
  %g = bf16[4,16,32]{2,1,0} parameter(3)
  %c = bf16[100,8]{1,0} parameter(4)
  %i = s32[4,1]{1,0} parameter(5)
  %u = bf16[4,8]{1,0} parameter(6)
  %s = bf16[2,4,16,32]{3,2,1,0} parameter(7)
  %sliced = bf16[64,16]{1,0} fusion(%d, %s), kind=kCustom, calls=%on_a_slice
  %append = bf16[100,8]{1,0} fusion(%c, %i, %u), kind=kInput, calls=%rows_in_place
  %half = bf16[4,16,8]{2,1,0} fusion(%s), kind=kLoop, calls=%half_of_a_layer
  %back = bf16[64,16]{1,0} custom-call(%d, %w), custom_call_target="mosaic_gpu_v2"
  %weights = bf16[4,16,32]{2,1,0} custom-call(%i, %x, %d), custom_call_target="mosaic_gpu_v2"
  ROOT %forward = bf16[64,32]{1,0} custom-call(%i, %x, %w, %g), custom_call_target="mosaic_gpu_v2"
}
"""


PRODUCTS = """HloModule products, is_scheduled=true

ENTRY %main (x: f32[8,16], w: f32[16,4], y: bf16[8,16], v: bf16[16,4]) -> f32[8,4] {
  %x = f32[8,16]{1,0} parameter(0)
  %w = f32[16,4]{1,0} parameter(1)
  %y = bf16[8,16]{1,0} parameter(2)
  %v = bf16[16,4]{1,0} parameter(3)
  %router = f32[8,4]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}, operand_precision={highest,highest}
  %logits = f32[8,4]{1,0} dot(%y, %v), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %cublas = (f32[8,4]{1,0}, s8[64]{0}) custom-call(%x, %w), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"lhs_batch_dimensions":[]},"precision_config":{"operand_precision":["DEFAULT","HIGHEST"]}}}
  ROOT %rounded = f32[8,4]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""


def test_products_run_at_the_rate_of_their_operands_type_and_precision():
    schedule = read_schedule(parse(PRODUCTS), ClusterConfig(), gpus=1, program="prefill", tokens_per_gpu=8)
    products = {entry["name"]: entry["product_dtype"] for entry in schedule["computations"]["main"]}
    assert products == {"router": "float32", "logits": "bf16", "cublas": "float32", "rounded": "tf32"}
    big = {"kind": "compute", "op": "gemm", "scope": "", "bytes": 0, "gemms": [[8192, 8192, 8192, 1]]}
    compute_s = make_estimates(ClusterConfig(gpu="h100")).compute_s
    seconds = {dtype: compute_s(big | {"product_dtype": dtype}) for dtype in ("float32", "tf32", "bf16")}
    assert seconds["tf32"] == pytest.approx(2 * seconds["bf16"], rel=0.01)
    assert seconds["float32"] == pytest.approx(989 / 67 * seconds["bf16"], rel=0.01)


def kernel_work(name, **rows):
    module = parse(KERNELS)
    return work_of(module, module.entry, module.entry.by_name[name], **rows)


def test_expert_kernels_have_a_product_for_each_weight_on_the_rows_with_tokens():
    assert kernel_work("forward").gemms == (Gemm(16, 32, 16, 4),) * 2
    assert kernel_work("back").gemms == (Gemm(16, 16, 32, 4),)
    assert kernel_work("weights").gemms == (Gemm(16, 32, 16, 4),)
    assert kernel_work("sliced") == kernel_work("back")
    # Half of the buffer's rows hold tokens: half of the FLOPs, all of the weights' bytes.
    half = kernel_work("forward", expert_rows=32)
    assert half.gemms == (Gemm(8, 32, 16, 4),) * 2
    assert half.memory_bytes == 2 * 4 * 16 * 32 * 2 + (64 * 16 + 64 * 32) * 2 / 2


def test_rows_written_in_place_cost_their_own_bytes_only():
    # Indices, rows read and rows written; not the 100 rows that stay.
    assert kernel_work("append").memory_bytes == 4 * 4 + 4 * 8 * 2 + 4 * 8 * 2


def test_of_a_slice_of_a_slice_the_smaller_is_read():
    assert kernel_work("half").memory_bytes == 2 * 4 * 16 * 8 * 2


@pytest.mark.parametrize(
    ("printed", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("replica_groups={}", [[0, 1, 2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['node'=2,'gpu'=2] {'node'}", [[0, 2], [1, 3]]),
    ],
)
def test_replica_groups_in_every_way_they_are_printed(printed, groups):
    np.testing.assert_array_equal(replica_groups(printed, 4), groups)


def test_scopes_of_differentiated_and_combined_names():
    path = "jit(step)/shard_map/transpose(jvp(moe))/while/body/dispatch/all_to_all"
    assert scope_of(path) == "moe/dispatch"
    assert scope_of("jit(f)/sum_gradients/psum:jit(f)/other/psum") == "sum_gradients"
    combined = "jit(decode)/while/body/moe/(expert_rows/all_gather:all_gather:dispatch/all_gather)"
    assert scope_of(combined) == "moe/dispatch"  # the tokens travel with their weights
    assert scope_of(combined.replace("dispatch", "counts")) == "moe/expert_rows"
