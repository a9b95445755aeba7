"""The authors' names and ours, both ways."""

from itertools import product

import pytest
import torch

from signal_reid import checkpoints
from signal_reid.upstream.parameters import authors_to_ours, ours_to_authors

BOTH = (True, False)


@pytest.mark.parametrize(("joint", "cameras", "sim", "alignment"), list(product(BOTH, (4, 0), BOTH, BOTH)))
def test_authors_file_loads_and_saves_back_bit_for_bit(
    joint, cameras, sim, alignment, foreign, make_model, same, tmp_path
):
    theirs = foreign.random_state(foreign.authors_shapes(16 * 8, joint, cameras, sim, alignment))
    model = make_model(
        f"model.heads={'joint' if joint else 'per_modality'}",
        f"model.backbone.camera_embedding={str(bool(cameras)).lower()}",
        f"model.selective_interaction={str(sim).lower()}",
        f"model.global_alignment={str(alignment).lower()}",
        f"model.local_alignment={str(alignment).lower()}",
    )
    torch.save(theirs, tmp_path / "theirs.pth")
    report = checkpoints.load(model, tmp_path / "theirs.pth")
    checkpoints.export(model, tmp_path / "back.pth", naming="authors")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert same(back, theirs)
    assert list(back) == list(theirs)
    assert (report.format, report.dropped, report.initialised) == ("authors", (), ())


def test_our_state_dict_goes_to_the_authors_and_back(make_model, same):
    ours = make_model().state_dict()
    assert same(authors_to_ours(ours_to_authors(ours)), ours)


def test_two_modalities_have_no_counterpart_at_the_authors(make_model, tmp_path):
    model = make_model("model.modalities=2")
    with pytest.raises(ValueError, match="3 modalities, this one 2"):
        checkpoints.export(model, tmp_path / "two.pth", naming="authors")
    with pytest.raises(ValueError, match="3 modalities, local_alignment"):
        ours_to_authors({"local_alignment.query_bias": model.local_alignment.query_bias})


def test_entry_without_a_counterpart_is_named():
    with pytest.raises(ValueError, match=r"extra\.weight has no counterpart"):
        ours_to_authors({"extra.weight": torch.zeros(1)})
