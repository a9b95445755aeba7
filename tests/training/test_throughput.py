"""Operations and peaks behind the printed MFU."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import signal_reid
from signal_reid.runtime.device import Precision
from signal_reid.training import throughput
from signal_reid.training.setup import slowness
from signal_reid.training.throughput import peak_flops, training_flops


def test_operations_are_those_that_pytorch_counts(tiny_config, monkeypatch):
    config = tiny_config("rgbnt201", "model.backbone.layers=2")
    model = signal_reid.build_model(config, 4, 2)
    images, cameras, labels = torch.randn(4, 3, 3, 64, 64), torch.zeros(4, dtype=torch.long), torch.tensor([0, 0, 1, 1])
    # Neither our operators nor the fused attention of the CPU are among what PyTorch counts; compiling, ours are plain.
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        losses = model.losses(model.encode(images, cameras), labels)
        signal_reid.training.total_loss(losses, config).backward()
    # Ours counts a backward as twice the forward; PyTorch leaves out the first layer's unneeded input gradient.
    assert 4 * training_flops(model) == pytest.approx(counter.get_total_flops(), rel=0.1)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 3090 Ti", 80),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
    ],
)
def test_peaks_of_known_cards(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(Precision("bf16", torch.device("cuda")))[0] == tflops * 1e12


LOOK_ALIKES = ["NVIDIA RTX A4000", "NVIDIA GeForce RTX 4080 SUPER", "NVIDIA A10G", "NVIDIA H100 NVL"]


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_a_card_that_only_looks_like_a_known_one_is_measured(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(signal_reid.training.throughput, "_measured_peak", lambda precision: 1.0)
    assert peak_flops(Precision("bf16", torch.device("cuda"))) == (1.0, "measured matrix product")


def test_a_peak_is_measured_with_products_that_take_no_minutes(monkeypatch):
    """A CPU without fp16 arithmetic takes minutes for the size at which fp32 reaches its peak."""
    sizes = []
    monkeypatch.setattr(throughput, "_fastest_product", lambda size, *_: sizes.append(size) or 0.1)
    peak, _ = peak_flops(Precision("fp16", torch.device("cpu")))
    assert sizes == [128]
    assert peak == 2 * 128**3 / 0.1


def test_fp16_on_a_cpu_is_said_to_be_slow():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert "training.precision=fp32" in slowness(Precision("fp16", cpu))
    assert slowness(Precision("bf16", cpu)) is slowness(Precision("fp16", gpu)) is None
