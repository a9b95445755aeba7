"""A method from one file outside the package: the program trains, resumes, evaluates, exports and reports it."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open

import signal_reid
from signal_reid.methods.registry import METHODS
from signal_reid.training import total_loss

METHOD = '''
"""Toy: one head on the mean token of each modality, which are pulled together."""

import torch.nn.functional as F
from torch import nn

from signal_reid.config import LossConfig, ModelConfig
from signal_reid.methods.base import Encoded, Method, Part
from signal_reid.methods.heads import Head
from signal_reid.methods.losses import head_loss


class ToyConfig(ModelConfig):
    pull: bool = True


class ToyLossConfig(LossConfig):
    pull: float = 0.5

    def weight(self, name):
        return self.pull if name == "pull" else 1.0


class Toy(Method):
    title = "Toy"
    settings = ToyConfig
    loss_settings = ToyLossConfig
    loss_titles = {"pull": "pull of the modalities"}
    parts = (Part("puller", "the model does not pull, which takes part in training only", training_only=True),)

    def __init__(self, config, num_identities, num_cameras):
        super().__init__(config, num_identities, num_cameras)
        dim = self.backbone.output_dim
        self.loss_config = config.losses
        self.heads = nn.ModuleList(Head(dim, num_identities) for _ in range(self.modalities))
        self.puller = nn.Linear(dim, dim) if config.model.pull else None

    def losses(self, encoded: Encoded, labels):
        means = encoded.tokens.mean(2).unbind(1)
        losses = {
            f"head_{m}": head_loss(head(mean), mean, labels, self.loss_config)
            for m, (head, mean) in enumerate(zip(self.heads, means, strict=True))
        }
        if self.puller is not None:
            losses["pull"] = F.mse_loss(self.puller(means[0]), means[1])
        return losses

    def feature(self, encoded: Encoded):
        return encoded.tokens.mean(2).flatten(1)
'''

CONFIG = """
output: {output}
model:
  method: toy
  backbone: {{layers: 1, width: 32, heads: 2, patch_size: 16, stride: 16, output_dim: 16}}
data: {{dataset: rgbnt201, root: {root}, image_size: [32, 32], batch_size: 8, instances: 2, workers: 0}}
losses: {{pull: 0.25}}
schedule: {{epochs: 12, warmup_epochs: 1}}
training: {{device: cpu, log_every: 1, compile: false}}
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A directory on the path into which pip installed a distribution of that one file."""
    project, site = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("site")
    (project / "toy_method.py").write_text(METHOD)
    (project / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "toy-method"\nversion = "0.1"\n'
        '[project.entry-points."signal_reid.methods"]\ntoy = "toy_method:Toy"\n'
        '[tool.setuptools]\npy-modules = ["toy_method"]\n'
    )
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", site, project], check=True)
    return site


@pytest.fixture(scope="module")
def program(installed, forking):
    """Runs `signal-reid` where the method is installed, in a process of its own."""
    return lambda *arguments: forking.start(forking.PROGRAM, *arguments, path=[installed])


@pytest.fixture(scope="module")
def trained(program, synthetic, tmp_path_factory):
    """The run directory of a training that was killed and resumed."""
    directory = tmp_path_factory.mktemp("runs")
    run, config = directory / "toy", directory / "toy.yml"
    config.write_text(CONFIG.format(output=run, root=synthetic()))
    first = program("train", "--config", config)
    while first.poll() is None and not (run / "checkpoint.pt").exists():
        time.sleep(0.002)
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    resumed = program("train", "--resume", run)
    assert resumed.wait() == 0, resumed.stderr
    return run


def rows(run, kind):
    return [row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if row["kind"] == kind]


def test_its_losses_are_trained_with_their_weights(trained):
    epochs = rows(trained, "epoch")
    assert [row["epoch"] for row in epochs] == list(range(1, 13))
    last = epochs[-1]
    heads = sum(last[f"head_{m}"] for m in range(3))
    assert last["total"] == pytest.approx(heads + 0.25 * last["pull"], rel=1e-5)


def test_it_is_evaluated_and_its_features_are_extracted(program, trained, tmp_path):
    weights = trained / "best.safetensors"
    for command, output in (("eval", "numbers.json"), ("extract", "features.safetensors")):
        done = program(command, "--weights", weights, "--output", tmp_path / output)
        assert done.wait() == 0, done.stderr
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["mAP"] == pytest.approx(max(row["mAP"] for row in rows(trained, "eval")))
    with safe_open(tmp_path / "features.safetensors", "np") as file:
        assert file.get_tensor("features").shape[1] == 3 * 16


def test_it_is_exported_and_knows_no_other_program_s_naming(program, trained, tmp_path):
    weights = trained / "last.safetensors"
    exported = program("export", "--weights", weights, "--output", tmp_path / "toy.safetensors")
    assert exported.wait() == 0, exported.stderr
    with safe_open(tmp_path / "toy.safetensors", "np") as file:
        assert file.metadata()["method"] == "toy"
        assert "puller.weight" in file.keys()  # noqa: SIM118 - not a mapping
    refused = program("export", "--weights", weights, "--output", tmp_path / "toy.pth", "--naming", "authors")
    assert refused.wait() == 2
    assert refused.stderr.splitlines()[-1] == "error: naming must be 'ours', got 'authors'"


def test_its_report_is_written_with_its_names(program, trained):
    (trained / "report.html").unlink()
    done = program("report", trained)
    assert done.wait() == 0, done.stderr
    page = (trained / "report.html").read_text()
    assert "Toy on rgbnt201" in page
    assert "pull of the modalities" in page


def test_a_setting_that_it_does_not_have_is_named(program, trained):
    refused = program("train", "--config", trained / "config.yml", "model.k_intra=3", "output=elsewhere")
    assert refused.wait() == 2
    assert refused.stderr.splitlines()[-1].startswith("error: unknown key model.k_intra")


def test_the_method_that_the_documentation_shows_trains(documented):
    documented(METHODS, "METHOD")
    small = {"layers": 1, "width": 32, "heads": 2, "output_dim": 16}
    values = {"method": "shown", "backbone": small, "dropout": 0.1}
    config = signal_reid.load_config({"model": values, "data": {"image_size": [32, 32]}})
    model = signal_reid.build_model(config, 4, 2)
    images, labels = torch.randn(4, 3, 3, 32, 32), torch.tensor([0, 0, 1, 1])
    total_loss(model.losses(model.encode(images), labels), config).backward()
    assert model.head.classifier.weight.grad.abs().sum() > 0
    assert model.eval()(images).shape == (4, 3 * 16)
