import errno
import sys

import pytest
import torch

from signal_reid.config import load_config
from signal_reid.data import loading
from signal_reid.data.decoding import decode
from signal_reid.data.errors import DataError
from signal_reid.data.layouts import open_dataset
from signal_reid.data.loading import TripletDataset, make_eval_loader, make_train_loader
from signal_reid.data.packing import pack


def same(first, second) -> bool:
    return len(first) == len(second) and all(
        torch.equal(x, y) for a, b in zip(first, second, strict=True) for x, y in zip(a, b, strict=True)
    )


def epoch_of(config, dataset, epoch=0):
    loader = make_train_loader(config, dataset)
    loader.set_epoch(epoch)
    return list(loader)


def test_a_training_batch_holds_labels_cameras_and_bicubic_images(rgbnt201, make_config):
    dataset = open_dataset("rgbnt201", rgbnt201)
    batch = next(iter(make_train_loader(make_config(rgbnt201), dataset)))
    assert batch.images.shape == (4, 3, 3, 32, 16)
    assert batch.images.dtype == torch.uint8
    for position, index in enumerate(batch.indices.tolist()):
        sample = dataset.train[index]
        assert batch.labels[position] == dataset.train_labels[sample.identity]
        assert batch.cameras[position] == sample.camera
        assert torch.equal(batch.images[position], decode(sample, (32, 16), "bicubic"))


def test_evaluation_yields_each_sample_once_in_order_with_bilinear_images(msvr310, make_config):
    dataset = open_dataset("msvr310", msvr310)
    config = make_config(msvr310, "msvr310")
    config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"batch_size": 5})})
    loader = make_eval_loader(config, dataset.query)
    batches = list(loader)
    assert [len(batch.indices) for batch in batches] == [5, 5, 2]
    assert len(loader) == 3
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(12))
    assert torch.cat([batch.labels for batch in batches]).tolist() == [sample.identity for sample in dataset.query]
    assert torch.cat([batch.scenes for batch in batches]).tolist() == [sample.scene for sample in dataset.query]
    assert torch.equal(batches[1].images[0], decode(dataset.query[5], (32, 16), "bilinear"))


@pytest.mark.parametrize("cache", ["none", "ram", "packed"])
def test_every_cache_gives_the_same_batches_with_and_without_workers(cache, rgbnt201, make_config):
    dataset = open_dataset("rgbnt201", rgbnt201)
    expected = epoch_of(make_config(rgbnt201), dataset, epoch=1)
    if cache == "packed":
        pack("rgbnt201", rgbnt201, make_config(rgbnt201))
    for workers in (0, 2):
        assert same(expected, epoch_of(make_config(rgbnt201, workers=workers, cache=cache), dataset, epoch=1))


def test_a_stale_packed_file_is_packed_again_before_it_is_read(rgbnt201, make_config):
    config = make_config(rgbnt201, cache="packed")
    pack("rgbnt201", rgbnt201, config)
    dataset = open_dataset("rgbnt201", rgbnt201)
    first, last = dataset.train[0].sources[0].path, dataset.train[-1].sources[0].path
    first.write_bytes(last.read_bytes())
    assert same(epoch_of(make_config(rgbnt201), dataset), epoch_of(config, dataset))


def test_persistent_workers_follow_the_epoch(rgbnt201, make_config):
    dataset = open_dataset("rgbnt201", rgbnt201)
    loader = make_train_loader(make_config(rgbnt201, workers=1), dataset)
    for epoch in range(2):
        loader.set_epoch(epoch)
        assert [batch.indices.tolist() for batch in loader] == loader.sampler.batches(epoch)


def loader_of_epochs(epochs, config):
    config = load_config(config.model_dump(), [f"schedule.epochs={epochs}"])
    return make_train_loader(config, open_dataset("rgbnt201", config.data.root))


@pytest.mark.parametrize("workers", [0, 1])
def test_epochs_are_dealt_as_asked_whatever_was_loaded_ahead(rgbnt201, make_config, workers):
    loader = loader_of_epochs(3, make_config(rgbnt201, workers=workers))
    for epoch, first in [(1, 0), (2, 0), (2, 1), (1, 0), (3, 0), (3, 0), (5, 0), (4, 0)]:
        loader.set_epoch(epoch, first)
        assert [batch.indices.tolist() for batch in loader] == loader.sampler.batches(epoch)[first:]
    loader.set_epoch(2)
    next(iter(loader))  # and given up
    loader.set_epoch(3)
    assert [batch.indices.tolist() for batch in loader] == loader.sampler.batches(3)


def test_workers_load_the_next_epoch_ahead_and_nothing_beyond_the_last(rgbnt201, make_config):
    loader = loader_of_epochs(2, make_config(rgbnt201, workers=1))
    dealt, part = [], loader.sampler.part
    loader.sampler.part = lambda epoch, first=0: dealt.append(epoch) or part(epoch, first)
    loader.set_epoch(1)
    assert len(list(loader)) == len(part(1))
    assert dealt == [1, 2]  # the second before it was asked for
    loader.set_epoch(2)
    assert len(list(loader)) == len(part(2))
    assert dealt == [1, 2, 2]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_stops_the_loader_with_one_line(workers, rgbnt201, make_config, truncate):
    dataset = open_dataset("rgbnt201", rgbnt201)
    truncate(dataset.query[3].sources[0].path)
    with pytest.raises(DataError, match=dataset.query[3].name) as caught:
        list(make_eval_loader(make_config(rgbnt201, workers=workers), dataset.query))
    assert len(str(caught.value).splitlines()) == 1


def test_an_unreadable_image_stops_filling_the_memory_cache(rgbnt201, make_config, truncate):
    dataset = open_dataset("rgbnt201", rgbnt201)
    truncate(dataset.train[3].sources[0].path)
    with pytest.raises(DataError, match=dataset.train[3].name):
        make_train_loader(make_config(rgbnt201, cache="ram"), dataset)


def test_the_memory_cache_reads_no_file_again(rgbnt201, make_config):
    dataset = open_dataset("rgbnt201", rgbnt201)
    expected = epoch_of(make_config(rgbnt201), dataset)
    loader = make_train_loader(make_config(rgbnt201, cache="ram"), dataset)
    for sample in dataset.train:
        sample.sources[0].path.unlink()
    assert same(expected, list(loader))


def test_the_memory_cache_is_shared_with_workers(rgbnt201):
    samples = open_dataset("rgbnt201", rgbnt201).train
    dataset = TripletDataset(samples, (32, 16), "bicubic", "ram", shared=True)
    assert dataset._cached is not None
    assert dataset._cached.is_shared()


def test_filling_the_memory_cache_reports_progress(rgbnt201, make_config):
    seen: list[tuple[int, int]] = []
    dataset = open_dataset("rgbnt201", rgbnt201)
    make_train_loader(make_config(rgbnt201, cache="ram"), dataset, progress=lambda *done: seen.append(done))
    assert seen[-1] == (12, 12)


def test_the_images_of_one_sample_can_be_asked_for(rgbnt201):
    samples = open_dataset("rgbnt201", rgbnt201).train
    assert torch.equal(TripletDataset(samples, (32, 16), "bilinear")[5], decode(samples[5], (32, 16), "bilinear"))


def test_no_samples_are_refused(rgbnt201, make_config):
    with pytest.raises(DataError, match="no samples"):
        make_eval_loader(make_config(rgbnt201), [])


def test_a_model_of_other_modalities_is_refused(rgbnt201, make_config):
    dataset = open_dataset("rgbnt201", rgbnt201)
    config = make_config(rgbnt201)
    config = config.model_copy(update={"model": config.model.model_copy(update={"modalities": 2})})
    with pytest.raises(DataError, match=r"model.modalities must be 3 for rgbnt201, got 2"):
        make_train_loader(config, dataset)


def test_a_batch_moves_as_one(rgbnt201, make_config):
    dataset = open_dataset("rgbnt201", rgbnt201)
    batch = next(iter(make_eval_loader(make_config(rgbnt201), dataset.query))).to("meta")
    assert {tensor.device.type for tensor in batch} == {"meta"}


def test_a_worker_short_of_descriptors_tries_again_without_a_word(monkeypatch, capsys):
    """The thread of multiprocessing that hands them over calls the hook for each try."""
    monkeypatch.setattr(sys, "excepthook", None)
    loading._share_patiently(0)
    for number, said in ((errno.EMFILE, ""), (errno.EPIPE, "BrokenPipeError: [Errno 32] broken\n")):
        sys.excepthook(OSError, OSError(number, "broken"), None)
        assert capsys.readouterr().err == said
