"""Training on 2 and 4 processes is training on one: batches, losses, gradients, weights, and after an interruption.

`sharing.py` is what the processes do; `python tests/training/sharing.py DIRECTORY ends` kills one at every stage.
"""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import signal_reid
from signal_reid.config import dump_config, load_config
from signal_reid.data import pack
from signal_reid.data.synthetic import synthesize
from signal_reid.runtime.distributed import Processes
from signal_reid.runtime.errors import InputError
from signal_reid.training.sharing import check_shareable

PUBLISHED = ("rgbnt201", "rgbnt100", "msvr310")
STEPS = 20
SHORT = {
    "combined": ["training.accumulation=2", "training.gradient_checkpointing=true", "data.cache=packed"],
    "low": ["training.precision=bf16", "training.accumulation=4", "data.workers=1"],
    "local": ["training.gather=local"],
}
"""What goes together: an epoch on one and two processes."""
SHIFTED_AWAY = ("selective_interaction.interaction.norm2.bias", "interaction_head.neck.running_mean")
"""A shift of all features alike: neither a distance nor a batch norm sees it, so its gradient is rounding alone, and
Adam makes steps of full length of that."""


@pytest.fixture(scope="module")
def ended(tmp_path_factory, tiny_config):
    """Where each process left what it saw of each case, and how the groups of processes ended."""
    directory = tmp_path_factory.mktemp("sharing")
    sizes = {"train_identities": 8, "test_identities": 3, "images_per_identity": 4, "cameras": 2}
    # Four batches an epoch: each of two identities, all of whose images are in it.
    settings = ("data.instances=4", "schedule.epochs=5", "evaluation.every=5", "schedule.warmup_epochs=1")
    for name in PUBLISHED:
        size = None if name == "rgbnt100" else (64, 64)
        root = synthesize(name, directory / "data" / name, **sizes, image_size=size)
        config = tiny_config(name, *settings, "training.log_every=1", "data.cache=ram", f"data.root={root}")
        (directory / f"{name}.yml").write_text(dump_config(config))
    for name, overrides in SHORT.items():
        base = tiny_config("rgbnt201", f"data.root={directory / 'data' / 'rgbnt201'}", "schedule.epochs=1")
        config = load_config(base.model_dump(), ["training.log_every=1", *overrides])
        (directory / f"{name}.yml").write_text(dump_config(config))
    pack("rgbnt201", config.data.root, config)
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("sharing.py"), directory, "equal"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=550,
        check=False,
    )
    said = [path.read_text() for path in directory.glob("*.txt")]
    assert done.returncode == 0, said
    ended = torch.load(directory / "ended.pt", weights_only=False)
    assert all(set(codes) == {0} for name, (codes, _, _) in ended.items() if name != "killed"), said
    return directory, ended


@pytest.fixture(scope="module")
def directory(ended):
    return ended[0]


@pytest.fixture(scope="module")
def results(directory):
    """By number of processes, what each left."""
    return {
        size: [torch.load(directory / f"{size}-{rank}.pt", weights_only=False) for rank in range(size)]
        for size in (1, 2, 4)
    }


CASES = [*((size, name) for size in (2, 4) for name in PUBLISHED), (2, "combined")]


@pytest.mark.parametrize(("size", "name"), CASES)
def test_batches_and_augmentation_are_one_process_s_to_the_bit(results, size, name):
    (alone,), shared = results[1], results[size]
    for seen in ("labels", "images"):
        parts = [torch.cat(step) for step in zip(*(result[name][seen] for result in shared), strict=True)]
        assert len(parts) == len(alone[name][seen]) == (STEPS if name in PUBLISHED else 4)
        assert all(map(torch.equal, parts, alone[name][seen]))


@pytest.mark.parametrize(("size", "name"), CASES)
def test_losses_metrics_and_gradients_are_one_process_s(results, size, name):
    (alone,), shared = results[1], results[size]
    rows, expected = shared[0][name]["rows"], alone[name]["rows"]
    assert [(row["kind"], row["epoch"], row["step"]) for row in rows] == [
        (row["kind"], row["epoch"], row["step"]) for row in expected
    ]
    parts = ("head_0", "head_1", "head_2", "head_3", "gam", "lam")
    for row, wanted in zip(rows, expected, strict=True):
        for key in {"total", "mAP", "rank1", "mINP", "learning_rate"} & wanted.keys():
            assert row[key] == pytest.approx(wanted[key], rel=1e-5), key
        # The parts to 1e-5 of the total: the distances of SIM's features, which an untrained model hardly tells apart,
        # are small differences of large squares in fp32.
        names = [key for key in parts if key in wanted]
        bound = 1e-5 * wanted.get("total", 0)
        assert [row[key] for key in names] == pytest.approx([wanted[key] for key in names], rel=0, abs=bound)
    for result in shared:
        assert result[name]["norms"] == pytest.approx(alone[name]["norms"], rel=1e-5)


@pytest.mark.parametrize(("size", "name"), CASES)
def test_weights_are_one_process_s_and_the_same_in_all(results, size, name):
    (alone,), shared = results[1], results[size]
    expected, first = alone[name]["weights"], shared[0][name]["weights"]
    for key, value in expected.items():
        assert all(torch.equal(result[name]["weights"][key], first[key]) for result in shared), key
        if key not in SHIFTED_AWAY:
            torch.testing.assert_close(first[key], value, rtol=1e-5, atol=1e-5, msg=key)


def test_low_precision_differs_by_its_rounding(results):
    """The parts of a batch are other matrices, whose products in bf16 round at other places."""
    (alone,), shared = results[1], results[2]
    assert totals(shared[0]["low"]["rows"]) == pytest.approx(totals(alone["low"]["rows"]), rel=2**-8)


def test_without_gathering_the_weights_are_the_same_in_all_and_the_losses_others(results):
    (alone,), (first, second) = results[1], results[2]
    assert all(map(torch.equal, first["local"]["weights"].values(), second["local"]["weights"].values()))
    assert first["local"]["labels"][0].unique().numel() == 2  # each process has whole identities
    one, two = (totals(result["local"]["rows"])[0] for result in (alone, first))
    assert one != pytest.approx(two, rel=1e-3)
    assert one == pytest.approx(two, rel=0.5)


def totals(rows):
    return [row["total"] for row in rows if "total" in row]


@pytest.mark.parametrize("before", [1, 2])
def test_a_run_stopped_within_an_epoch_goes_on_in_another_number_of_processes(results, directory, before):
    expected = results[1][0]["rgbnt201"]["rows"]
    stopped = [row["step"] for row in results[before][0]["stopped"]["rows"] if row["kind"] == "step"]
    assert stopped[-1] in (5, 6)  # of several processes all hear of it one step later
    rows = torch.load(directory / f"resumed-stopped-by-{before}-0.pt", weights_only=False)["rows"]
    assert [(row["kind"], row["step"]) for row in rows] == [(row["kind"], row["step"]) for row in expected]
    assert totals(rows) == pytest.approx(totals(expected), rel=1e-5)


def test_a_killed_process_ends_the_others_with_one_line_that_names_it(ended):
    directory, groups = ended
    codes, said, seconds = groups["killed"]
    assert codes == [2, -signal.SIGKILL]
    (line,) = [line for line in said.splitlines() if "rror" in line or "Traceback" in line]
    assert re.match(r"error: process 1 of 2 on \S+ \(pid \d+\) ended without a word or hangs \(", line)
    assert seconds < 60
    assert not list((directory / "backward-SIGKILL").rglob("*.tmp"))


def test_a_restarted_run_ends_as_one_that_nothing_disturbed(results, directory):
    """The store still holds what the killed processes left in it, as torchrun's does after it restarted them."""
    expected = results[2][0]["rgbnt201"]
    restarted = torch.load(directory / "resumed-backward-SIGKILL-0.pt", weights_only=False)
    assert totals(restarted["rows"]) == pytest.approx(totals(expected["rows"]), rel=1e-5)
    for key, value in expected["weights"].items():
        if key not in SHIFTED_AWAY:
            torch.testing.assert_close(restarted["weights"][key], value, rtol=1e-5, atol=1e-5, msg=key)


def test_the_benchmark_counts_what_two_processes_exchange(results, tiny_config):
    (first,), (second,) = (result["scaling"] for result in results[2])
    assert (first["seconds"], first["loss"]) == (second["seconds"], second["loss"])
    toy = ("model.backbone.patch_size=16", "model.backbone.stride=16", "data.image_size=[256,128]")
    model = signal_reid.build_model(tiny_config("rgbnt201", *toy), 171, 4)
    assert first["counted"] == {
        "gradient": sum(p.nbytes for p in model.parameters() if p.requires_grad),
        "gathered": 4 * (4 * (9 * 32 + 1) + 8),  # nine vectors of 32, the loss of LAM and a label
        "buffer": sum(buffer.nbytes for buffer in model.buffers()),
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["training.cuda_graphs=true"], "training.cuda_graphs cannot go with 2 processes"),
        (["data.batch_size=10", "data.instances=5", "training.accumulation=2"], "must divide the 5 samples"),
        (["training.gather=local", "data.instances=4"], "at least 2 whole identities of data.instances=4"),
    ],
)
def test_what_cannot_go_together_is_refused(tiny_config, settings, message):
    with pytest.raises(InputError, match=message):
        check_shareable(tiny_config("rgbnt201", *settings), Processes(0, 2, 0, 2))


def test_processes_must_divide_the_batch(tiny_config):
    with pytest.raises(InputError, match="multiple of the 3 processes, got 8"):
        check_shareable(tiny_config(), Processes(0, 3, 0, 3))
