"""Several processes get what one gets.

Groups of 2 and 3 are forked once each with the variables that torchrun sets, and `sharing.py` is what they do; torchrun
itself starts the program where an image is unreadable.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import signal_reid
from signal_reid.config import dump_config
from signal_reid.data import open_dataset, pack
from signal_reid.evaluation import load_features
from signal_reid.runtime.device import choose_device
from signal_reid.runtime.distributed import ALONE, Processes, join_processes

SHARING = Path(__file__).with_name("sharing.py")


def torchrun(size, *command):
    """Start processes of one thread each, so that their sums have one order."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    return subprocess.run(
        [*launcher, *map(str, command)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tiny_config, synthetic):
    """A directory with data sets, their configurations and weights."""
    directory = tmp_path_factory.mktemp("sharing")
    for layout in ("rgbnt201", "msvr310"):
        root = shutil.copytree(synthetic(layout), directory / layout)
        config = tiny_config(layout, f"data.root={root}", f"output={directory / 'run'}")
        (directory / f"{layout}.yml").write_text(dump_config(config))
        dataset = open_dataset(layout, root)
        torch.manual_seed(0)
        model = signal_reid.build_model(config, dataset.num_train_identities, dataset.num_cameras)
        signal_reid.checkpoints.export(model, directory / f"{layout}.safetensors", config=config)
        pack(layout, root, config)
    return directory


def variables(rank, size, port):
    """What torchrun tells a process."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(number) for name, number in numbers.items()}}


@pytest.fixture(scope="module", params=[2, 3], ids="{} processes".format)
def shared(request, prepared, tmp_path_factory, forking):
    """What each process left, and the directory that they worked in."""
    directory = tmp_path_factory.mktemp("processes")
    for path in prepared.glob("*.*"):
        shutil.copy(path, directory)
    run = f"import runpy; runpy.run_path({str(SHARING)!r}, run_name='__main__')"
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    ranks = range(request.param)
    group = [forking.start(run, directory, **variables(rank, len(ranks), store.port), **agent) for rank in ranks]
    assert [process.wait() for process in group] == [0] * len(ranks), [process.stderr for process in group]
    assert not (prepared / "run").exists()
    return [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(request.param)], directory


def identical(first, second):
    """Of numbers, arrays, tensors or sequences of them: equal bit for bit, NaN included."""
    if isinstance(first, (tuple, list)):
        return len(first) == len(second) and all(map(identical, first, second))
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and identical(*(x.view(torch.uint8).numpy() for x in (first, second)))
    return np.asarray(first).tobytes() == np.asarray(second).tobytes()


def test_processes_know_each_other_and_leave_nothing_behind(shared):
    results, _ = shared
    size = len(results)
    assert [result["joined"] for result in results] == [(rank, size, rank, size, 1) for rank in range(size)]
    assert not any(result["left"] for result in results)


def test_rows_are_gathered_in_the_order_of_ranks(shared):
    results, _ = shared
    for name in results[0]["gathered"]:
        given = [rows for rows, _ in (result["gathered"][name] for result in results) if rows is not None]
        for result in results:
            rows = result["gathered"][name][1]
            assert rows is None if not given else torch.equal(rows, torch.cat(given)), name


def test_metrics_are_those_of_one_process(shared):
    results, _ = shared
    kinds = [name.rpartition(", ")[2] for name in results[0]["measured"]]
    assert kinds.count("one set") == kinds.count("two sets") > 1
    for name, (alone, _) in results[0]["measured"].items():
        assert all(identical(alone, result["measured"][name][1]) for result in results), name


def test_features_and_metrics_of_an_evaluation_are_those_of_one_process(shared):
    results, _ = shared
    assert results[0]["evaluated"]["in bf16"]["alone"][0].dtype == torch.bfloat16
    for name, case in results[0]["evaluated"].items():
        assert all(identical(case["alone"], result["evaluated"][name]["shared"]) for result in results), name


@pytest.mark.parametrize("name", ["images", "one disk", "one disk, loaded", "a disk each", "a disk each, loaded"])
def test_shards_of_an_index_find_what_one_process_finds(shared, name):
    results, directory = shared
    assert len({result["searched"]["alone"][name][0][0].name for result in results}) == 1
    for result in results:
        assert result["searched"]["together"][name] == result["searched"]["alone"][name]
    for rank in range(len(results)):  # each has its own shards alone
        own = {path.name for path in (directory / "together" / f"features-{rank}").glob("segment-*")}
        described = json.loads((directory / "together" / f"features-{rank}" / "index.json").read_text())["parts"]
        assert own == {part["file"] for part in described if part["process"] == rank}


@pytest.mark.parametrize("name", ["even", "uneven", "more processes than batches", "kept in memory"])
def test_each_image_is_decoded_in_one_process(shared, name):
    results, _ = shared
    decoded = [path for result in results for path in result["evaluated"][name]["decoded"]]
    assert sorted(decoded) == sorted(results[0]["evaluated"][name]["decoded alone"])
    idle = [not result["evaluated"][name]["decoded"] for result in results]
    assert idle == [name == "more processes than batches" and rank > 0 for rank in range(len(results))]


def test_a_stale_packed_file_is_packed_again_once(shared):
    results, _ = shared
    assert [result["repacked"] for result in results] == [1] + [0] * (len(results) - 1)


def test_all_processes_raise_what_is_wrong_with_the_whole(shared):
    results, _ = shared
    assert "got NaN or infinity in 1 of 12, the first at index 7" in results[0]["failed"]["not finite"]
    assert "no query has a match" in results[0]["failed"]["no matches"]
    assert "must be of one shape and dtype" in results[0]["failed"]["shapes"]
    assert "no samples to load" in results[0]["failed"]["no batches"]
    assert all(result["failed"] == results[0]["failed"] for result in results)


def test_the_program_writes_the_files_of_one_process(shared):
    results, directory = shared
    assert [result["commands"][name][0] for result in results for name in ("eval", "extract")] == [0, 0] * len(results)
    assert (directory / "shared.json").read_bytes() == (directory / "alone.json").read_bytes()
    assert (directory / "shared.safetensors").read_bytes() == (directory / "alone.safetensors").read_bytes()
    assert len(load_features(directory / "shared.safetensors")[0]) == 12


def test_only_process_0_shows_anything(shared):
    results, _ = shared
    for name in ("eval", "extract"):
        shown = [output + errors for _, output, errors in (result["commands"][name] for result in results)]
        assert "entries loaded" in shown[0]
        assert not any(shown[1:])


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("a wrong key", "unknown key data.rot"),
        ("a wrong device", "training.device must be auto, cpu or cuda for"),
        *((name, f"{name} runs in one process, got WORLD_SIZE=") for name in ("demo", "report", "data")),
    ],
)
def test_a_mistake_that_all_processes_meet_is_said_once(shared, command, message):
    results, _ = shared
    codes, outputs, errors = zip(*(result["commands"][command] for result in results), strict=True)
    (line,) = "".join(errors).splitlines()
    assert line.startswith(f"error: {message}")
    assert (set(codes), set(outputs)) == ({2}, {""})


def test_commands_that_write_nothing_run_in_every_process(shared):
    results, _ = shared
    for result in results:
        code, output, _ = result["commands"]["config"]
        assert code == 0
        assert "dataset: rgbnt201" in output


def test_an_unreadable_image_in_one_share_ends_all_processes(prepared, tmp_path):
    root = shutil.copytree(prepared / "rgbnt201", tmp_path / "damaged")
    lost = sorted((root / "test" / "TI").iterdir())[-1]
    lost.write_bytes(lost.read_bytes()[:300])
    weights = ["--config", prepared / "rgbnt201.yml", "--weights", prepared / "rgbnt201.safetensors"]
    settings = [f"data.root={root}", "evaluation.batch_size=2"]
    done = torchrun(2, "-m", "signal_reid", "eval", *weights, "--output", tmp_path / "numbers.json", *settings)
    assert done.returncode != 0
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert lost.name in line
    assert not (tmp_path / "numbers.json").exists()


@given(length=st.integers(0, 40), unit=st.integers(1, 9), size=st.integers(1, 9))
def test_shares_are_the_whole_in_order_cut_between_units(length, unit, size):
    shares = [Processes(rank, size).share(range(length), unit) for rank in range(size)]
    assert [item for share in shares for item in share] == list(range(length))
    assert all(share.start % unit == 0 for share in shares if share)
    units = [-(-len(share) // unit) for share in shares]
    assert units == sorted(units, reverse=True)
    assert max(units) - min(units) <= 1


@pytest.mark.parametrize("size", [None, "1"])
def test_one_process_initialises_nothing(monkeypatch, size):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if size is not None:
        monkeypatch.setenv("WORLD_SIZE", size)
    rows = torch.ones(2, 3)
    with join_processes() as processes:
        assert processes is ALONE
        assert processes.gather(rows, "cpu") is rows
        assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number, got 'two'"),
        ({"WORLD_SIZE": "2"}, r"RANK must be set where WORLD_SIZE is \(2\); torchrun sets them"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "LOCAL_RANK must be set"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "MASTER_ADDR expected, but not set"),
    ],
)
def test_variables_that_torchrun_would_set_otherwise(monkeypatch, variables, message):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message), join_processes():
        pass


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_process_needs_a_gpu_of_its_own(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="3 processes, 2 GPUs"):
        choose_device(name, Processes(rank=1, size=3, local_rank=1, local_size=3))
    chosen = []
    monkeypatch.setattr(torch, "empty", lambda *_, device: chosen.append(device))
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert choose_device(name, Processes(rank=3, size=4, local_rank=1, local_size=2)) == torch.device("cuda:1")
    assert chosen == [torch.device("cuda:1")] * 2


def test_processes_without_a_gpu_take_the_cpu():
    assert choose_device("cpu", Processes(rank=1, size=2, local_rank=1, local_size=2)) == torch.device("cpu")
    with pytest.raises(ValueError, match="must be auto, cpu or cuda for 2 processes, got 'cuda:1'"):
        choose_device("cuda:1", Processes(rank=1, size=2, local_rank=1, local_size=2))
