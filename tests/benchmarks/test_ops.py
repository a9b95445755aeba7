"""The benchmark of the operators checks first, counts what PyTorch dispatches, and keeps quiet of wrong results."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from signal_reid import ops
from signal_reid.methods.signal.global_alignment import GlobalAlignment
from signal_reid.methods.signal.local_alignment import LocalAlignment
from signal_reid.methods.signal.selective_interaction import SelectiveInteraction
from signal_reid.ops.backend import OPERATORS

SMALL = ["--batch", "4", "--device", "cpu", "--no-filling"]


@pytest.fixture
def benchmark(script, monkeypatch):
    ops = script("ops")
    measure = ops.dispatch_overhead
    monkeypatch.setattr(ops, "dispatch_overhead", lambda step: measure(step, calls=1, repeats=1))
    return ops


@pytest.fixture
def counting(script):
    return script("harness.counting")


def rows_of(benchmark, tmp_path, *arguments):
    assert benchmark.main([*SMALL, *arguments, "--json", str(tmp_path / "out.json")]) == 0
    return json.loads((tmp_path / "out.json").read_text())["rows"]


def test_each_pass_of_each_operator_has_cost_floors_counts_and_overhead(benchmark, tmp_path):
    names = list(benchmark.STEPS)
    names.remove("quick_gelu")
    rows = [row for row in rows_of(benchmark, tmp_path, "--ops", *names, "--precision", "fp32", "bf16") if "op" in row]
    assert {row["op"] for row in rows} == set(names)
    assert {row["precision"] for row in rows} == {"fp32", "bf16"}
    for row in rows:
        if row["backend"] in ("reference", "cuda"):
            assert all(row[key] > 0 for key in ("MB", "must_MB", "floor_us H100"))
            assert row["floor_us RTX 3090"] > row["floor_us H100"]
            assert row["estimate_us H100"] > row["floor_us H100"] * 0.9  # a read that the cache serves may be left out
    passes = {backend: by_pass(rows, backend) for backend in ("reference", "cuda")}
    for key, of_cuda in passes["cuda"].items():
        assert passes["reference"][key]["launches"] > of_cuda["launches"]
        assert any(name.startswith("dispatch_") and value > 0 for name, value in of_cuda.items())


def by_pass(rows, backend):
    return {(row["op"], row["step"], row["precision"]): row for row in rows if row["backend"] == backend}


def test_every_operator_of_the_registry_is_measured_or_says_why_not(script):
    op_steps = script("harness.op_steps")
    assert op_steps.MODULES.keys() | op_steps.not_measured().keys() == set(OPERATORS)
    assert op_steps.not_measured().keys() == op_steps.NOT_MEASURED.keys()


def test_backends_stand_side_by_side(benchmark, tmp_path):
    rows = rows_of(benchmark, tmp_path, "--ops", "gramian_volume", "--backend", "all")
    assert [(row["step"], row["backend"]) for row in rows if "op" in row] == [
        (step, side)
        for step in ("forward", "backward")
        for side in ("reference", "compiled reference", "triton", "cuda")
    ]


def test_no_time_but_a_reason_is_given_where_there_is_no_gpu(benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark.triton, "INTERPRETING", True)
    rows = [row for row in rows_of(benchmark, tmp_path, "--ops", "gramian_volume") if "op" in row]
    assert not [key for row in rows for key in row if "p50" in key]
    reasons = {row["backend"]: row["not timed"] for row in rows}
    assert reasons["reference"] == reasons["compiled reference"] == "times are taken on a GPU"
    assert reasons["triton"] == "TRITON_INTERPRET=1: the interpreter is not timed"
    assert reasons["cuda"]


def test_ratios_are_of_medians_to_plain_pytorch_eager_and_compiled(benchmark, script, monkeypatch):
    step = script("harness.op_steps").STEPS["gramian_volume"](4, torch.randn)[0]
    seconds = {"reference": [4.0, 6.0, 8.0], "compiled reference": [3.0] * 3, "cuda": [2.0] * 3}
    monkeypatch.setattr(benchmark, "device_times", lambda calls, *_: {side: seconds[side] for side in calls})
    args = SimpleNamespace(runs=3, warmup=1)
    times = benchmark.time_on_device(step, ["reference", "cuda"], True, args, torch.device("cpu"))
    assert {side: (row["eager_ratio"], row["compiled_ratio"]) for side, row in times.items()} == {
        "reference": (1.0, 0.5),
        "compiled reference": (2.0, 1.0),
        "cuda": (3.0, 1.5),
    }


def test_backend_that_refuses_a_size_has_a_row_that_says_so(benchmark, tmp_path, monkeypatch):
    original = benchmark.check

    def check(step, backend, precision):
        if backend == "cuda":
            raise benchmark.ops.BackendError("backend cuda cannot do that")
        original(step, backend, precision)

    monkeypatch.setattr(benchmark, "check", check)
    monkeypatch.setattr(benchmark, "reason_against", lambda side, device: None)
    monkeypatch.setattr(benchmark, "SIDES", ("reference", "cuda"))
    monkeypatch.setattr(benchmark, "time_on_device", lambda step, sides, *_: {side: {"p50_us": 1.0} for side in sides})
    rows = [row for row in rows_of(benchmark, tmp_path, "--ops", "gramian_volume") if "op" in row]
    assert {(row["backend"], row.get("p50_us"), row.get("not timed")) for row in rows} == {
        ("reference", 1.0, None),
        ("cuda", None, "backend cuda cannot do that"),
    }


def test_a_side_that_fails_has_a_row_and_stops_no_other(benchmark, tmp_path, monkeypatch, capsys):
    original = benchmark.check

    def check(step, backend, precision):
        if backend == "triton":
            raise RuntimeError("PassManager::run failed\nat length")
        original(step, backend, precision)

    monkeypatch.setattr(benchmark, "check", check)
    monkeypatch.setattr(benchmark, "reason_against", lambda side, device: None)
    monkeypatch.setattr(benchmark, "SIDES", ("reference", "triton"))
    monkeypatch.setattr(benchmark, "time_on_device", lambda step, sides, *_: {side: {"p50_us": 1.0} for side in sides})
    file = tmp_path / "out.json"
    assert benchmark.main([*SMALL, "--ops", "select_tokens", "gramian_volume", "--json", str(file)]) == 1
    failed = [row["failed"] for row in json.loads(file.read_text())["rows"] if "failed" in row]
    assert failed[:2] == [
        "select_tokens forward by triton: PassManager::run failed",
        "gramian_volume forward by triton: PassManager::run failed",
    ]
    assert capsys.readouterr().err == f"error: {'; '.join(failed)}\n"


def test_the_bytes_and_operations_of_selection_are_those_of_its_definition(script):
    step = script("harness.op_steps").STEPS["select_tokens"](2, torch.zeros)[0]
    tokens = 2 * 3 * 128
    assert step.moved == 4 * (tokens * 512 + 2 * 2 * 3 * 512) + tokens
    assert step.operations == 2 * tokens * 3 * 512  # each token meets three queries


def test_the_bytes_of_addition_and_normalisation_are_those_of_each_tensor_once(script):
    def zeros(*shape):
        return torch.zeros(*shape, dtype=torch.bfloat16)

    forward, backward = script("harness.op_steps").STEPS["add_layer_norm"](2, zeros)
    stream, parameters = 2 * 3 * 129 * 768, 2 * 768 * 4
    assert forward.moved == (4 + 2 + 4 + 2) * stream + parameters
    assert backward.moved == (2 + 4 + 4 + 4 + 2) * stream + 1.5 * parameters


def test_the_bytes_of_masked_attention_are_those_of_the_tokens_that_are_kept(script):
    def counting_up(*shape):
        return torch.arange(float(torch.tensor(shape).prod())).reshape(shape) - 99  # 98 of the mask's are too small

    forward, backward = script("harness.op_steps").STEPS["attend_masked"](2, counting_up)
    kept, queries = 2 * 3 * 128 - 98, 2 * 24 * 512
    assert forward.moved == 4 * (kept * 512 + 2 * queries) + 2 * 3 * 128
    assert backward.moved == 4 * (kept * 512 + 2 * 3 * 128 * 512 + 4 * queries) + 2 * 3 * 128
    assert (forward.operations, backward.operations) == (4 * kept * 24 * 512, 8 * kept * 24 * 512)


@pytest.mark.parametrize(("B", "launches"), [(4, 1), (1, 2)])
def test_masked_attention_takes_a_second_launch_where_samples_are_split(counting, B, launches):
    queries, tokens, mask = torch.ones(B, 2, 8), torch.ones(B, 2, 64, 8), torch.ones(B, 2, 64, dtype=torch.bool)
    mask[:, 0] = False
    with counting.as_on_a_gpu():
        found = counting.count(lambda: ops.attend_masked(queries, tokens, mask))
    assert found.launches == launches
    logits = B * 2 * (2 * 64 + 2)
    assert found.moved == 2 * 4 * queries.numel() + mask.numel() + 4 * (tokens.numel() + logits) // 2  # half are kept


def test_masked_attention_multiplies_on_tensor_cores_in_low_precision(counting):
    mask = torch.ones(1, 2, 3, dtype=torch.bool)
    for dtype in (torch.float32, torch.bfloat16):
        queries, tokens = torch.ones(1, 2, 8, dtype=dtype), torch.ones(1, 2, 3, 8, dtype=dtype)
        with counting.as_on_a_gpu():
            found = counting.count(lambda queries=queries, tokens=tokens: ops.attend_masked(queries, tokens, mask))
        assert [work.on_tensor_cores for work in found.work] == [dtype == torch.bfloat16]


def test_a_prediction_adds_the_longer_of_moving_and_computing_and_the_launches(script, counting):
    roofline = script("harness.roofline")
    card = roofline.Card(bandwidth=1e9, rate=1e12, low_rate=1e13)
    assert card.floor_us(1000) == pytest.approx(1.0)
    assert card.floor_us(1000, 5_000_000) == pytest.approx(5.0)
    moving = counting.Work("a", 1, moved=1000, operations=1000)
    computing = counting.Work("b", 2, moved=1000, operations=5_000_000)
    on_tensor_cores = counting.Work("c", 0, moved=1000, operations=20_000_000, on_tensor_cores=True)
    count = counting.Count([moving, computing, on_tensor_cores])
    assert card.estimate_us(count) == pytest.approx(1.0 + 5.0 + 2.0 + 3 * roofline.LAUNCH_US)


def test_a_table_shows_floor_and_estimate_of_a_card_in_one_column(script, counting):
    roofline = script("harness.roofline")
    work = counting.Count([counting.Work("a", 2, moved=9_360_000)])
    row = roofline.readable({"op": "x"} | roofline.costs(work, 4_680_000))
    assert row["RTX 3090 us"] == "5 → 15"
    assert (row["launches"], row["MB"], row["must MB"], row["ratio"]) == (2, 9.36, 4.68, 2.0)


@pytest.mark.parametrize(
    "name",
    [
        "select_tokens",
        "gramian_volume",
        "gramian_contrastive_loss",
        "deformable_sample",
        "predict_offsets",
        "pairwise_mse_loss",
        "attend_masked",
        "add_layer_norm",
    ],
)
def test_wrong_results_are_reported_without_a_row(benchmark, tmp_path, monkeypatch, capsys, name):
    def spoilt(value):
        if isinstance(value, tuple):
            return tuple(map(spoilt, value))
        return ~value if value.dtype == torch.bool else value * 1.001

    def steps(*arguments, original=benchmark.STEPS[name]):
        first, *_ = original(*arguments)
        return [replace(first, ours=lambda *x: spoilt(first.ours(*x)))]

    monkeypatch.setitem(benchmark.STEPS, name, steps)
    assert benchmark.main([*SMALL, "--ops", name, "--json", str(tmp_path / "out.json")]) == 1
    output = capsys.readouterr()
    assert output.err.startswith(f"error: {name} forward by reference in fp32: relative error")
    assert not output.out
    assert not list(tmp_path.iterdir())


def test_views_are_not_counted_and_numbers_made_tensors_are(counting):
    x = torch.zeros(4, 4)
    assert counting.count(lambda: x.T[1:].reshape(-1).detach()[None]).operators == 1  # reshape copies
    assert counting.count(lambda: x.add_(torch.tensor(1.0))).operators == 2


@pytest.mark.parametrize(
    ("step", "syncs"),
    [
        (lambda x: x[x > 0], 1),
        (lambda x: x.sum().item(), 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: x[torch.tensor([1, 0])], 0),
        (lambda x: x.where(x > 0, 0), 0),
    ],
)
def test_waits_for_the_device_are_counted(counting, step, syncs):
    assert counting.count(lambda: step(torch.ones(4))).syncs == syncs


def test_an_operator_without_kernels_is_counted_as_those_that_it_calls(counting):
    tokens = torch.ones(1, 2, 3, 4)
    found = counting.count(lambda: ops.mean_tokens(tokens))
    with ops.use_backend("reference"):
        assert counting.count(lambda: ops.mean_tokens(tokens)).operators == 1
    assert found.operators == found.launches == 3  # two means and what puts them together


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_global_alignment_takes_three_launches_forward_and_three_backward(counting, dtype):
    module, results = GlobalAlignment(), []
    tokens = torch.randn(4, 3, 9, 16).to(dtype)[:, :, 1:].requires_grad_()
    leaves, grad = (tokens, module.temperature), torch.ones(())
    with counting.as_on_a_gpu():
        forward = counting.count(lambda: results.append(module(tokens)))
        backward = counting.count(lambda: results.append(torch.autograd.grad(results[0], leaves, grad)))
    assert (forward.launches, backward.launches) == (3, 3)
    assert forward.syncs == backward.syncs == 0
    assert results[1][0].stride(2) == 0  # spread over the tokens as a view


@pytest.mark.parametrize(
    ("dtype", "launches"), [(torch.float32, (9, 12)), (torch.float16, (10, 13)), (torch.bfloat16, (10, 13))]
)
def test_local_alignment_takes_at_most_ten_launches_forward_and_thirteen_backward(counting, dtype, launches):
    module, results = LocalAlignment(16, 3, (8, 8)), []
    tokens = torch.randn(4, 3, 65, 16).to(dtype)[:, :, 1:].requires_grad_()
    leaves, grad = (tokens, *module.parameters()), torch.ones(())

    def forward():
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            results.append(module(tokens))

    with counting.as_on_a_gpu():
        of_forward = counting.count(forward)
        of_backward = counting.count(lambda: results.append(torch.autograd.grad(results[0], leaves, grad)))
    assert (of_forward.launches, of_backward.launches) == launches
    assert of_forward.syncs == of_backward.syncs == 0


def test_the_bytes_of_the_offset_head_are_those_of_each_tensor_once(script):
    forward, backward = script("harness.op_steps").STEPS["predict_offsets"](2, torch.zeros)
    hidden, parameters, offsets = 3 * 2 * 128 * 512, 3 * 512 * 19, 3 * 2 * 8
    assert forward.moved == 4 * (hidden + parameters + offsets)
    assert backward.moved == 4 * (2 * hidden + 2 * parameters + offsets)


def test_every_launcher_has_its_launches_stated(counting, benchmarks_directory):
    bindings = (benchmarks_directory.parent / "csrc" / "bindings.cpp").read_text()
    assert set(re.findall(r'define\(m, "(\w+)"', bindings)) == counting.LAUNCHES.keys()


@pytest.mark.parametrize(("dtype", "launches"), [(torch.float32, (15, 26)), (torch.bfloat16, (17, 27))])
def test_selective_interaction_takes_as_many_launches_as_its_table_says(counting, script, dtype, launches):
    with counting.without_values(), counting.as_on_a_gpu():
        subject = script("harness.module_costs").our_subjects(64, dtype)["SIM"]
        assert isinstance(subject.module, SelectiveInteraction)
        counts = subject.passes(dtype).counts
    assert tuple(found.launches for found in counts) == launches
    assert not any(found.syncs for found in counts)


def test_a_backend_that_cannot_serve_is_one_line_and_exit_code_2(benchmark, capsys):
    assert benchmark.main([*SMALL, "--ops", "gramian_volume", "--backend", "cuda"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: backend cuda cannot serve")
    assert error.count("\n") == 1
