"""The benchmark of the training step runs, checks first, and says nothing when the check fails."""

import json
import sys

import pytest
import torch

SMALL = ["--layers", "1", "--batch", "4", "--runs", "1", "--warmup", "0", "--device", "cpu", "--threads", "1"]
NARROW = ["--set", "model.backbone.width=48", "model.backbone.heads=3", "model.backbone.output_dim=32"]


@pytest.fixture
def train_step(script):
    return script("train_step")


def test_the_script_times_a_step_and_its_peak_memory(train_step, benchmarks_directory, tmp_path, monkeypatch):
    """The peak is that of a process of its own, which runs the script."""
    monkeypatch.setenv("PYTHONPATH", str(benchmarks_directory.parent))
    assert train_step.main([*SMALL, *NARROW, "--json", str(tmp_path / "out.json")]) == 0
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert row["step"] == "ours fp32"
    assert row["p50_ms"] > 0
    if sys.platform == "linux":
        assert 0 < row["step_MiB"] < row["peak_MiB"]


def test_the_check_may_take_fewer_triplets_than_are_timed(train_step, monkeypatch, capsys):
    seen = []

    def stop(*_):
        raise RuntimeError("timed")

    monkeypatch.setattr(train_step, "sides", lambda config, inputs, args: seen.append(len(inputs.labels)) or [None] * 3)
    monkeypatch.setattr(train_step, "check", lambda *arguments: seen.append(("checked", len(arguments[4].labels))))
    monkeypatch.setattr(train_step, "measure", stop)
    assert train_step.main([*SMALL, "--batch", "6", "--check-batch", "4"]) == 1
    assert seen == [4, ("checked", 4), 6]
    assert capsys.readouterr().err == "error: timed\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--check-batch", "6"], "--check-batch must be a multiple of 2 from 4 to --batch (4), got 6"),
        (["--check-batch", "4", "--options", "compiled"], "--check-batch goes without --options"),
    ],
)
def test_a_check_that_cannot_be_is_refused(train_step, capsys, options, message):
    assert train_step.main([*SMALL, *options]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_wrong_results_are_reported_without_a_time(train_step, tmp_path, monkeypatch, capsys):
    step = train_step.Side.step
    monkeypatch.setattr(train_step.Side, "step", lambda side, precision: step(side, precision) * 1.001)
    assert train_step.main([*SMALL, *NARROW, "--no-memory", "--json", str(tmp_path / "out.json")]) == 1
    output = capsys.readouterr()
    assert output.err.startswith("error: loss: relative error 1.00e-03")
    assert "_ms" not in output.out
    assert not list(tmp_path.iterdir())


def test_a_step_leaves_the_weights_and_keeps_the_optimizer_s_state(train_step):
    model = torch.nn.Linear(3, 1)
    x, before = torch.ones(2, 3), model.weight.detach().clone()
    optimizer = train_step.keep_weights(torch.optim.Adam(model.parameters(), lr=1.0))

    def gradients(precision, scaler):
        loss = model(x).sum()
        loss.backward()
        return loss

    side = train_step.Side(model, optimizer, gradients)
    side.step("fp32")
    assert torch.equal(model.weight, before)
    assert side.gradient_norm() == pytest.approx((3 * 4 + 4) ** 0.5)
    assert len(optimizer.state) == 2


def test_options_are_rows_of_their_own(train_step, tmp_path):
    options = ["--options", "checkpointing", "accumulation", "backbone", "--profile", str(tmp_path / "trace.json")]
    assert train_step.main([*SMALL, *NARROW, *options, "--no-memory", "--json", str(tmp_path / "out.json")]) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["step"] for row in rows] == [
        f"ours fp32{o}" for o in ("", " checkpointing", " accumulation", " backbone")
    ]
    assert all(row["mfu"] > 0 for row in rows[:3])
    assert {row["settings"] for row in rows} == {" ".join(NARROW[1:])}
    assert ["modules_share" in row for row in rows] == [True, False, False, False]
    assert any(
        event.get("name") == "aten::addmm" for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    )


def test_the_share_of_the_modules_is_what_the_step_takes_beyond_the_backbone(train_step):
    args = train_step.parse(SMALL)
    seconds = {"ours bf16 compiled": [1.0, 2.0, 4.0], "ours bf16 compiled-backbone": [0.9, 1.9, 3.9]}
    row = train_step.row_of("ours bf16 compiled", seconds, "upstream fp32", args, torch.device("cpu"))
    assert row["modules_share"] == pytest.approx(0.05)


def test_a_batch_has_as_many_images_of_each_identity_as_the_authors_triplet_loss_needs(train_step):
    args = train_step.parse(["--config", "rgbnt100", "--batch", "128", "--layers", "1"])
    config = train_step.signal_reid.load_config("rgbnt100")
    labels = train_step.make_inputs(config, args, torch.device("cpu")).labels
    assert labels.bincount().tolist() == [4] * 32  # pairs of RGBNT100's 50 identities would not do
    assert train_step.instances(64, 171) == 2


def test_graphs_need_a_gpu(train_step, capsys):
    assert train_step.main([*SMALL, *NARROW, "--options", "graphs", "--no-memory"]) == 2
    assert capsys.readouterr().err.startswith("error: training.cuda_graphs needs a GPU")


def test_an_odd_batch_is_refused(train_step, capsys):
    assert train_step.main([*SMALL, "--batch", "5"]) == 2
    assert capsys.readouterr().err == "error: --batch must be a multiple of 2, got 5\n"
