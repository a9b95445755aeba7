"""Configurations are strict, name what is wrong, and read the authors' files as they are."""

import re

import pytest
from pydantic import BaseModel

from signal_reid.config import ConfigError, dump_config, load_config, published_names
from signal_reid.config.explaining import explain_settings

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


@pytest.mark.parametrize("name", published_names())
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


@pytest.mark.parametrize(
    "key", ["MODEL.IF_LABELSMOOTH", "TEST.RE_RANKING", "TEST.FEAT_NORM", "MODEL.USE_B", "MODEL.USE_A"]
)
def test_their_switches_are_strict(authors, key):
    def read(text):
        config = load_config(authors, [f"{key}={text}"])
        return {
            "MODEL.IF_LABELSMOOTH": config.losses.label_smoothing == 0.1,
            "TEST.RE_RANKING": config.evaluation.reranking,
            "TEST.FEAT_NORM": config.evaluation.normalize,
            "MODEL.USE_B": config.model.global_alignment,
            "MODEL.USE_A": config.model.selective_interaction,
        }[key]

    for text in ("on", "yes", "True", "'on'", "'yes'"):
        assert read(text)
    for text in ("off", "no", "False", "'off'", "'no'"):
        assert not read(text)
    with pytest.raises(ConfigError, match=f"^{key} must be on, yes, True, off, no or False, got 'maybe'$"):
        read("maybe")


def test_their_overrides_mean_what_the_same_lines_in_their_file_mean():
    model = {"TRANSFORMER_TYPE": "ViT-B-16", "USE_A": True, "USE_B": False, "stageName": "together_CLS_Patch"}
    config = load_config({"MODEL": model}, ["MODEL.USE_B=True"])
    assert config == load_config({"MODEL": model | {"USE_B": True}})
    assert config.model.global_alignment
    assert config.model.local_alignment


def test_output_keeps_the_part_that_is_not_overridden(authors):
    assert load_config(authors, ["OUTPUT_DIR=x"]).output == "x/MSVR310_all"
    assert load_config(authors, ["ckpt_save_path=y"]).output == "y"
    assert load_config("msvr310", ["OUTPUT_DIR=x"]).output == "x"
    assert load_config("msvr310", ["OUTPUT_DIR=x", "ckpt_save_path=y"]).output == "x/y"


@pytest.mark.parametrize("ours", [True, False])
def test_their_settings_that_must_agree_do_so_among_overrides(authors, ours):
    source = "msvr310" if ours else authors
    with pytest.raises(ConfigError, match=r"INPUT.SIZE_TEST must equal INPUT.SIZE_TRAIN \(\[128, 256\]\)"):
        load_config(source, ["INPUT.SIZE_TRAIN=[128,256]", "INPUT.SIZE_TEST=[256,128]"])
    both = load_config(source, ["INPUT.SIZE_TRAIN=[256,128]", "INPUT.SIZE_TEST=[256,128]"])
    assert both.data.image_size == (256, 128)


def test_one_of_two_agreeing_overrides_is_enough_on_our_configurations():
    assert load_config("msvr310", ["INPUT.SIZE_TRAIN=[256,128]"]).data.image_size == (256, 128)


@pytest.mark.parametrize("ours", [True, False])
def test_our_overrides_come_after_theirs_in_order(authors, ours):
    overrides = ["schedule.epochs=3", "schedule.epochs=4", "SOLVER.MAX_EPOCHS=5"]
    assert load_config("msvr310" if ours else authors, overrides).schedule.epochs == 4


@pytest.mark.parametrize(
    "text", ["2024-11-22", "2024-13-45", "2024", "/a/b: c", "hash #2", "~/runs", "[a", "True", "null"]
)
@pytest.mark.parametrize("key", ["output", "data.root", "OUTPUT_DIR", "DATASETS.ROOT_DIR"])
def test_paths_are_taken_as_they_are_written(key, text):
    config = load_config("msvr310", [f"{key}={text}"])
    assert text == (config.output if key.lower().startswith("output") else config.data.root)


@pytest.mark.parametrize("key", ["model.backbone.weights", "MODEL.PRETRAIN_PATH_T"])
def test_weights_are_a_path_or_none(key):
    assert load_config("msvr310", [f"{key}=2024"]).model.backbone.weights == "2024"
    for text in ("null", "None", "~"):
        assert load_config("msvr310", [f"{key}=a.pt", f"{key}={text}"]).model.backbone.weights is None


def test_numbers_written_as_python_none_are_none():
    assert load_config("msvr310", ["optimizer.backbone_rate=None"]).optimizer.backbone_rate is None


def test_a_path_in_their_file_may_be_a_python_string_but_not_a_number():
    model = {"TRANSFORMER_TYPE": "ViT-B-16"}
    config = load_config({"MODEL": model, "DATASETS": {"ROOT_DIR": "('..')"}, "OUTPUT_DIR": "2024"})
    assert config.data.root == ".."
    assert config.output == "2024/baseline"
    with pytest.raises(ConfigError, match=r"^OUTPUT_DIR must be a path, got 2024$"):
        load_config({"MODEL": model, "OUTPUT_DIR": 2024})


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("optimizer.base_rate=inf", "optimizer.base_rate"),
        ("optimizer.backbone_rate=.inf", "optimizer.backbone_rate"),
        ("losses.triplet=.inf", "losses.triplet"),
        ("losses.identity=1e999", "losses.identity"),
        ("data.std=[.nan,1,1]", "data.std"),
        ("data.mean=[0,0,nan]", "data.mean"),
        ("model.offset_range=inf", "model.offset_range"),
        ("model.backbone.sie_coe=-inf", "model.backbone.sie_coe"),
    ],
)
def test_numbers_are_finite(override, key):
    with pytest.raises(ConfigError, match=f"^{key}: input should be a finite number"):
        load_config("rgbnt201", [override])


def test_scientific_numbers_in_lists():
    assert load_config("rgbnt201", ["data.mean=[5e-1,0,0]"]).data.mean == (0.5, 0.0, 0.0)


def test_global_alignment_needs_at_most_five_modalities():
    load_config("rgbnt201", ["model.modalities=5"])
    load_config("rgbnt201", ["model.modalities=6", "model.global_alignment=False"])
    with pytest.raises(ConfigError, match=r"^model.global_alignment needs 2 to 5 modalities, got 6$"):
        load_config("rgbnt201", ["model.modalities=6"])


def test_features_are_extracted_in_fp32_unless_asked():
    assert load_config("rgbnt201").evaluation.precision == "fp32"
    assert load_config("rgbnt201", ["evaluation.precision=bf16"]).evaluation.precision == "bf16"


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
        ("data.dataset=market", "data.dataset must be one of .*rgbnt201.*, got 'market'"),
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1: 2\n", "unknown key 1"),
        ("model:\n  2: 3\n", "unknown key model.2"),
        ("MODEL:\n  2: 3\n", "unknown key MODEL.2"),
        (
            "model:\n  k_intra: 64\nSOLVER:\n  SEED: 1\n",
            "model and SOLVER: a file uses either our keys or the authors', not both",
        ),
        ("output: 2024-11-22\n", "output: input should be a valid string"),
        ("output: 2024-13-45\n", "is not valid YAML: month must be in 1..12"),
        ("output: \0\n", "is not valid YAML: unacceptable character"),
    ],
)
def test_a_mistake_in_a_file_is_one_line(tmp_path, text, message):
    path = tmp_path / "config.yml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_config(path)
    assert "\n" not in str(error.value)


def test_a_binary_file_is_named(tmp_path):
    path = tmp_path / "weights.pt"
    path.write_bytes(b"\x80\x02\xff\xfe")
    with pytest.raises(ConfigError, match=r"weights.pt: not a text file in UTF-8"):
        load_config(path)


def test_a_section_without_a_value_is_empty(tmp_path):
    path = tmp_path / "config.yml"
    path.write_text("model:\ndata:\n  augmentation:\n")
    assert load_config(path) == load_config({})
    path.write_text("MODEL:\n  TRANSFORMER_TYPE: ViT-B-16\nSOLVER:\n")
    assert load_config(path) == load_config({"MODEL": {"TRANSFORMER_TYPE": "ViT-B-16"}})


def test_missing_file_names_the_published_ones():
    with pytest.raises(FileNotFoundError, match=re.escape(", ".join(published_names()))):
        load_config("rgbnt202")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.compile=maybe", r"training\.compile: input should be .*'auto', got 'maybe'"),
        ("lr=1e-3", r"unknown key lr; the nearest valid key is optimizer\.base_rate"),
        ("batch=8", r"unknown key batch; the nearest valid key is data\.batch_size"),
    ],
)
def test_an_error_names_the_setting_as_a_user_writes_it(override, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_config("rgbnt201", [override])
    assert "compile.bool" not in str(error.value)


@pytest.mark.parametrize("name", ["rgbnt201", "msvr310"])
def test_every_setting_is_explained(name):
    config = load_config(name)
    found = {it.key: it for it in explain_settings()}
    assert found.keys() == flat_keys(config)
    assert [key for key, it in found.items() if len(it.meaning.split()) < 2 or not it.allowed] == []
    assert found["training.precision"].allowed == "one of auto, fp32, bf16, fp16"
    assert found["optimizer.backbone_rate"].allowed == "a number or null, above 0"
    assert found["data.image_size"].default == (256, 128)
    assert [it.key for it in explain_settings("schedule")][:2] == ["schedule.name", "schedule.epochs"]
    with pytest.raises(ConfigError, match=r"the nearest valid key is training\.precision"):
        explain_settings("training.precission")


def flat_keys(config):
    def keys(values, prefix=""):
        for key, value in values:
            if isinstance(value, BaseModel):
                yield from keys(value, f"{prefix}{key}.")
            else:
                yield prefix + key

    return set(keys(config))
