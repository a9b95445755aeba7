"""Pictures as a user asks for them: which samples, of which weights, and one line where there can be none."""

import pytest
import torch

import signal_reid
from signal_reid import checkpoints
from signal_reid.data import open_dataset
from signal_reid.evaluation.trained import load_beside, load_trained
from signal_reid.methods.signal.model import Signal
from signal_reid.report.picture_samples import TestSamples, find_sample
from signal_reid.report.pictures import Request, find_picture
from signal_reid.runtime.errors import InputError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(tiny_config, synthetic):
    return tiny_config("rgbnt201", f"data.root={synthetic()}", "data.batch_size=6", "data.instances=2")


@pytest.fixture(scope="module")
def dataset(config):
    return open_dataset("rgbnt201", config.data.root)


@pytest.fixture(scope="module")
def weights(config, tmp_path_factory):
    torch.manual_seed(7)
    model = signal_reid.build_model(config, 5, 2)
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    checkpoints.export(model, path, "ours", config)
    return path


class TestWhichSamples:
    def test_chosen_ones_show_identities_far_apart_in_the_querys_order(self, config, dataset):
        samples = TestSamples(config, dataset, CPU)
        names = samples.chosen(2).names
        identities = [find_sample(dataset, name).identity for name in names]
        assert len(set(identities)) == 2
        assert identities == sorted(identities)
        assert len(samples.chosen(99).names) == 3  # one of each identity

    def test_a_count_that_was_asked_for_counts_more_than_what_suits_the_picture(self, config, dataset):
        assert len(TestSamples(config, dataset, CPU, count=1).chosen(3).names) == 1

    def test_named_ones_come_in_the_order_in_which_they_are_named(self, config, dataset):
        names = [dataset.query[5].name, dataset.query[1].name.removesuffix(".jpg")]
        shown = TestSamples(config, dataset, CPU, names).chosen(3)
        assert shown.names == [dataset.query[5].name, dataset.query[1].name]
        assert shown.images.dtype == torch.uint8
        torch.testing.assert_close(shown.inputs, shown.images / 127.5 - 1)
        assert shown.identities.tolist() == [dataset.query[5].identity, dataset.query[1].identity]

    def test_a_batch_has_as_many_of_each_identity_as_a_training_batch(self, config, dataset):
        shown = TestSamples(config, dataset, CPU).batch()
        assert shown.identities.unique_consecutive(return_counts=True)[1].tolist() == [2, 2, 2]

    def test_a_batch_begins_with_the_identities_of_named_samples(self, config, dataset):
        last = dataset.query[-1]
        assert TestSamples(config, dataset, CPU, [last.name]).batch().identities[0] == last.identity

    def test_all_are_every_test_sample_once_or_so_many_evenly_apart(self, config, dataset):
        everything = [name for shown in TestSamples(config, dataset, CPU).all() for name in shown.names]
        assert sorted(everything) == sorted({sample.name for sample in (*dataset.query, *dataset.gallery)})
        seen = []
        limited = TestSamples(config, dataset, CPU, limit=3, progress=lambda done, total: seen.append((done, total)))
        assert [name for shown in limited.all() for name in shown.names] == [everything[i] for i in (2, 6, 10)]
        assert seen == [(3, 3)]

    def test_a_name_that_is_none_is_one_line_with_near_ones(self, dataset):
        given = dataset.query[0].name.replace("cam", "cat")
        with pytest.raises(InputError, match=f"is named '{given}'; near it: .*{dataset.query[0].name}"):
            find_sample(dataset, given)

    @pytest.mark.parametrize("number", ["count", "limit"])
    def test_a_number_below_one_is_refused(self, config, dataset, number):
        with pytest.raises(InputError, match=f"{number} must be at least 1, got 0"):
            TestSamples(config, dataset, CPU, **{number: 0})


class TestWhichWeights:
    def test_a_picture_in_python_is_a_figure_with_its_numbers(self, weights):
        picture = signal_reid.show("tokens", weights, request=Request(count=1))
        assert picture.figure.get_size_inches()[0] == pytest.approx(3.3)
        assert picture.tables[0].header == ["sample", "kept by", "RGB", "NI", "TI"]

    def test_before_stands_beside_after(self, weights):
        picture = signal_reid.show("tokens", weights, before="pretrained")
        assert [layered.title for layered in picture.layers] == ["before training", "after training"]
        before, after = (layered.layers[0].cells for layered in picture.layers)
        assert not torch.equal(before, after)

    def test_the_model_as_training_began_is_the_one_that_training_builds(self, config, weights):
        torch.manual_seed(config.training.seed)
        expected = signal_reid.build_model(config, 5, 2).state_dict()
        trained = load_trained(weights)
        model, told = load_beside(trained.config, trained.model, trained.dataset)
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
        assert told == "as training began: random weights of training.seed=1234"

    def test_weights_without_a_part_show_nothing_of_it(self, config, weights, tmp_path, tiny_config):
        lacking = config.model_copy(update={"model": config.model.model_copy(update={"local_alignment": False})})
        checkpoints.export(signal_reid.build_model(lacking, 5, 2), tmp_path / "lacking.safetensors", "ours", config)
        with pytest.raises(InputError, match=r"no picture of offsets: .*lacking\.safetensors hold no local_alignment"):
            signal_reid.show("offsets", tmp_path / "lacking.safetensors")
        assert signal_reid.show("tokens", tmp_path / "lacking.safetensors", request=Request(count=1)).tables

    def test_an_unknown_picture_lists_those_that_there_are(self):
        with pytest.raises(InputError, match="a picture of Signal must be one of tokens, offsets, volumes, attention"):
            find_picture(Signal, "heads")
