"""The model that a file of weights needs."""

import pytest

from signal_reid import build_model, checkpoints
from signal_reid.evaluation.trained import load_model


@pytest.mark.parametrize("setting", ["width=3000000", "layers=1000000", "output_dim=8000000"])
def test_a_carried_configuration_of_a_huge_model_is_refused(setting, tiny_config, tmp_path):
    """Before any memory is taken for a layer of it, and where there are many, before they fill the memory."""
    path = tmp_path / "weights.safetensors"
    config = tiny_config("rgbnt201", f"model.backbone.{setting}")
    checkpoints.export(build_model(tiny_config("rgbnt201"), 5, 2), path, config=config)
    with pytest.raises(checkpoints.CheckpointError, match=r"weights\.safetensors: holds \d+ numbers, and the config"):
        load_model(path)


def test_a_wrong_setting_of_a_carried_configuration_names_the_file(tiny_config, tmp_path):
    path = tmp_path / "weights.safetensors"
    checkpoints.export(build_model(tiny_config("rgbnt201"), 5, 2), path, config="data: {root: 3}")
    with pytest.raises(checkpoints.CheckpointError, match=r"weights\.safetensors: the configuration .* data\.root"):
        load_model(path)
