"""Configurations are strict, name what is wrong, and read the authors' files as they are."""

import pytest

from signal_reid.config import PUBLISHED, ConfigError, dump_config, load_config

AUTHORS = """
MODEL:
  TRANSFORMER_TYPE: 'ViT-B-16'
  STRIDE_SIZE: [ 16, 16 ]
  SIE_CAMERA: True
  SIE_COE: 1.0
  DIRECT: 0
  ID_LOSS_WEIGHT: 0.25
  TRIPLET_LOSS_WEIGHT: 1.0
  Gram_Loss_weight: 0.2
  PAT_Loss_weight: 0.01
  USE_A: True
  TOPK: 64
  USE_B: True
  stageName: 'together_CLS_Patch'
INPUT:
  SIZE_TRAIN: [ 128, 256 ]
  SIZE_TEST: [ 128, 256 ]
  PROB: 0.5
  RE_PROB: 0.5
  PADDING: 10
DATALOADER:
  SAMPLER: 'softmax_triplet'
  NUM_INSTANCE: 4
  NUM_WORKERS: 8
DATASETS:
  NAMES: ('MSVR310')
  ROOT_DIR: '..'
SOLVER:
  BASE_LR: 5e-6
  WARMUP_ITERS: 0
  MAX_EPOCHS: 50
  OPTIMIZER_NAME: 'Adam'
  GAMMA: 0.1
  IMS_PER_BATCH: 64
  EVAL_PERIOD: 1
  STEPS: [20, 40]
TEST:
  IMS_PER_BATCH: 64
  RE_RANKING: 'no'
  WEIGHT: ''
  NECK_FEAT: 'before'
  FEAT_NORM: 'yes'
  MISS: "nothing"
OUTPUT_DIR: '.'
ckpt_save_path: 'MSVR310_all'
ckpt_test_path: 'test_MSVR310'
"""


@pytest.fixture
def authors(tmp_path):
    path = tmp_path / "Signal.yml"
    path.write_text(AUTHORS)
    return path


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_survive_a_round_trip(name, tmp_path):
    config = load_config(name)
    path = tmp_path / "config.yml"
    path.write_text(dump_config(config))
    assert load_config(path) == config


def test_authors_file_is_the_published_recipe(authors):
    ours = load_config("msvr310").model_dump()
    theirs = load_config(authors).model_dump()
    assert theirs.pop("output") == "MSVR310_all"
    assert theirs["data"].pop("root") == ".."
    for place in (ours["data"], theirs["data"]):
        place.pop("workers")
    for place in (ours["evaluation"], theirs["evaluation"]):
        place.pop("batch_size")
    del ours["output"], ours["data"]["root"]
    assert theirs == ours


def test_what_their_file_leaves_out_is_their_default():
    config = load_config({"MODEL": {"TRANSFORMER_TYPE": "ViT-B-16"}})
    assert config.optimizer.name == "sgd"
    assert config.optimizer.base_rate == 0.009
    assert config.model.backbone.sie_coe == 3.0
    assert not config.model.selective_interaction
    assert not config.model.global_alignment
    assert config.schedule.epochs == 120


def test_alignment_without_local_part(authors):
    config = load_config(authors, ["MODEL.stageName=CLS"])
    assert config.model.global_alignment
    assert not config.model.local_alignment


@pytest.mark.parametrize("override", ["schedule.epochs=3", "SOLVER.MAX_EPOCHS=3"])
@pytest.mark.parametrize("ours", [True, False])
def test_overrides_in_either_naming_on_either_file(authors, ours, override):
    source = "msvr310" if ours else authors
    assert load_config(source, [override]).schedule.epochs == 3


def test_scientific_numbers_and_whole_numbers_are_floats():
    config = load_config("rgbnt201", ["optimizer.base_rate=5e-6", "losses.triplet=1"])
    assert config.optimizer.base_rate == 5e-6
    assert config.losses.triplet == 1.0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("schedule.epoch=3", "unknown key schedule.epoch; the nearest valid key is schedule.epochs"),
        ("epochs=3", "unknown key epochs; the nearest valid key is schedule.epochs"),
        ("SOLVER.MAX_EPOCH=3", "unknown key SOLVER.MAX_EPOCH; the nearest valid key is SOLVER.MAX_EPOCHS"),
        ("schedule.epochs=many", "schedule.epochs: input should be a valid integer, got 'many'"),
        ("schedule.epochs=2.5", "schedule.epochs: input should be a valid integer"),
        ("model.selective_interaction=1", "model.selective_interaction: input should be a valid boolean, got 1"),
        ("data.dataset=market", "data.dataset: input should be 'rgbnt201', 'rgbnt100' or 'msvr310', got 'market'"),
        ("data.batch_size=60", r"data.batch_size must be a multiple of data.instances \(8\), got 60"),
        ("data.batch_size=8", "data.batch_size must hold at least 2 identities"),
        ("model.k_intra=129", r"model.k_intra must be in 1\.\.128 \(N\), got 129"),
        ("model.backbone.heads=7", r"model.backbone.heads must divide width \(768\), got 7"),
        ("data.image_size=[64,32]", "model.k_intra must be in"),
        ("MODEL.PROMPT=True", "MODEL.PROMPT must be False, got True"),
        ("MODEL.TRANSFORMER_TYPE=t2t_vit_t_14", "MODEL.TRANSFORMER_TYPE must be 'ViT-B-16', got 't2t_vit_t_14'"),
        ("schedule.epochs", "an override must read key=value, got 'schedule.epochs'"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(override, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_config("rgbnt201", [override])
    assert "\n" not in str(error.value)


def test_unknown_keys_in_files_are_named(tmp_path):
    path = tmp_path / "config.yml"
    path.write_text("model:\n  backbon:\n    layers: 2\n")
    with pytest.raises(ConfigError, match=r"unknown key model.backbon; the nearest valid key is model.backbone"):
        load_config(path)
    path.write_text("model: [1, 2\n")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        load_config(path)
    path.write_text("- 1\n")
    with pytest.raises(ConfigError, match="a configuration is a mapping of keys, got list"):
        load_config(path)


def test_missing_file_names_the_published_ones():
    with pytest.raises(FileNotFoundError, match="rgbnt201, rgbnt100, msvr310, demo"):
        load_config("rgbnt202")
