"""Signal's pictures: what is drawn is what the model computes, found again by other means."""

import math
from functools import cache
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from matplotlib.axis import Axis
from matplotlib.text import Text
from torch import nn

import signal_reid
from signal_reid import ops
from signal_reid.methods.pictures import Shown
from signal_reid.methods.signal.model import Signal
from signal_reid.methods.signal.pictures import attention, offsets, tokens, volumes
from signal_reid.methods.signal.selective_interaction import CrossModalInteraction, TokenSelection
from signal_reid.report.pictures import draw_models, known_pictures, reason_against
from signal_reid.runtime.errors import InputError

GRID, SIZE = (16, 8), (128, 64)
AREA = (0.0, 0.0, 128.0, 64.0)


class Samples:
    """Random samples of a model's size, two of each identity."""

    def __init__(self, modalities=("RGB", "NI", "TI"), count=4):
        torch.manual_seed(1)
        self.modalities = modalities
        images = torch.randint(256, (count, len(modalities), 3, *SIZE), dtype=torch.uint8)
        cameras, identities = torch.arange(count) % 2, torch.arange(count) // 2
        names = [f"{i:04d}_$a_{'long' * 9}.jpg" for i in range(count)]
        self.shown = Shown(images, images / 127.5 - 1, cameras, identities, names)

    def chosen(self, default):
        parts = (getattr(self.shown, name)[:default] for name in ("images", "inputs", "cameras", "identities", "names"))
        return Shown(*parts)

    def batch(self):
        return self.shown

    def all(self):
        yield self.shown
        yield self.shown


class One(Samples):
    """The same, of which one is chosen."""

    def chosen(self, default):
        return super().chosen(1)


@pytest.fixture(scope="module")
def model(tiny_config):
    torch.manual_seed(0)
    config = tiny_config("rgbnt201", "model.backbone.layers=2", "data.image_size=[128,64]")
    return signal_reid.build_model(config, 8, 4).eval()


@pytest.fixture(scope="module")
def once(model):
    """The picture of that name of the model, drawn at the first use."""
    return cache(lambda name: drawn(name, model))


def drawn(name, models, samples=None, width=None):
    models = models if isinstance(models, dict) else {"": models}
    picture = known_pictures(Signal)[name]
    return draw_models(picture, models, samples or Samples(), torch.device("cpu"), width=width)


def outside(axis):
    """The labels of ticks beyond an axis, which Matplotlib keeps and does not draw."""
    low, high = sorted(axis.get_view_interval())
    ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    return [label for tick in ticks if not low <= tick.get_loc() <= high for label in (tick.label1, tick.label2)]


def texts(figure):
    """Every piece of text that is shown, and where, in pixels."""
    figure.draw_without_rendering()
    hidden = [label for axis in figure.findobj(Axis) for label in outside(axis)]
    artists = [artist for artist in figure.findobj(Text) if artist.get_visible() and artist.get_text()]
    artists = [artist for artist in artists if not any(artist is label for label in hidden)]
    return [(artist.get_text(), artist.get_window_extent(), artist.get_fontsize()) for artist in artists]


@pytest.mark.parametrize(
    ("name", "width"),
    [("tokens", "page"), ("offsets", "page"), ("volumes", "page"), ("attention", "page"), ("volumes", "column")],
)
def test_no_text_is_cut_off_too_small_or_over_other_text(name, width, model, make_model):
    models = {"before training": make_model(seed=1), "after training": model} if width == "page" else model
    figure = drawn(name, models, One(), width).figure
    shown = texts(figure)
    for text, box, size in shown:
        inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        assert inside, f"{text!r} is cut off"
        assert size >= 7, f"{text!r} is too small"
    for (one, a, _), (other, b, _) in combinations(shown, 2):
        apart = a.x0 >= b.x1 or b.x0 >= a.x1 or a.y0 >= b.y1 - 1 or b.y0 >= a.y1 - 1
        assert apart, f"{one!r} and {other!r} overlap"


@pytest.mark.parametrize("name", ["tokens", "offsets", "volumes", "attention"])
def test_every_picture_takes_two_modalities(name, make_model):
    picture = drawn(name, make_model("model.modalities=2"), One(("RGB", "TI")))
    assert picture.tables
    assert picture.caption


@pytest.mark.parametrize(
    ("name", "part", "said"),
    [
        ("tokens", "selective_interaction", "the model has no SIM"),
        ("offsets", "local_alignment", "the model has no LAM"),
        ("volumes", "global_alignment", "the model has no GAM"),
    ],
)
def test_a_picture_of_a_part_that_is_switched_off_says_why_it_cannot_be(name, part, said, make_model):
    with pytest.raises(InputError, match=f"no picture of {name}: {said}"):
        drawn(name, make_model(f"model.{part}=false"))


def test_attention_is_drawn_without_sim_and_says_what_is_left_out(make_model):
    picture = drawn("attention", make_model("model.selective_interaction=false"), One())
    assert picture.notes == ["There is no row of SIM: the model has no selective interaction."]
    assert len(picture.layers[0].layers) == 2  # the blocks of the backbone


def test_volumes_need_a_positive_temperature(make_model):
    model = make_model()
    with torch.no_grad():
        model.global_alignment.temperature.fill_(-0.5)
    assert reason_against(known_pictures(Signal)["volumes"], model) == "GAM's temperature must be positive, got -0.5"


class TestTokens:
    @pytest.mark.parametrize("M", [2, 3, 4])
    def test_the_union_over_class_tokens_is_what_the_reference_selects(self, M):
        torch.manual_seed(M)
        selection, x, cls = TokenSelection(8, 5), torch.randn(3, M, 12, 8), torch.randn(3, M, 8)
        kept = tokens.kept_by_each(selection, x, cls)
        with ops.use_backend("reference"):
            assert torch.equal(kept.any(1), selection(x, cls))

    @pytest.mark.parametrize("M", [2, 3])
    def test_each_class_token_keeps_the_tokens_that_sorting_by_hand_finds(self, M):
        torch.manual_seed(0)
        k, N = 3, 7
        selection, x, cls = TokenSelection(4, k), torch.randn(1, M, N, 4), torch.randn(1, M, 4)
        kept = tokens.kept_by_each(selection, x, cls)
        q, keys = selection.query(cls)[0], selection.key(x)[0]
        for m in range(M):
            own = sorted(range(N), key=lambda n: -float(cls[0, m] @ x[0, m, n]))[:k]
            assert kept[0, m, m].nonzero().flatten().tolist() == sorted(own)
            others = [(o, n) for o in range(M) if o != m for n in range(N)]
            best = sorted(others, key=lambda at: -float(q[m] @ keys[at]))[: min(2 * k, len(others))]
            found = {(o, n) for o in range(M) if o != m for n in kept[0, m, o].nonzero().flatten().tolist()}
            assert found == set(best)

    def test_what_is_drawn_is_the_selection_of_the_model(self, model, once):
        picture, shown = once("tokens"), Samples().chosen(3)
        with torch.no_grad(), ops.use_backend("reference"):
            mask = model.selective_interaction.selection(*model.encode(shown.inputs, shown.cameras))
        for sample in range(3):
            for m in range(3):
                axes = picture.figure.axes[sample * 15 + 3 + m]  # the row of kept tokens
                veil = torch.as_tensor(axes.images[-1].get_array()[..., 3])
                assert torch.equal(veil == 0, mask[sample, m].view(GRID))
                assert axes.get_xlabel() == f"{int(mask[sample, m].sum())} of 128"

    def test_the_layers_of_a_page_cover_what_is_kept_and_tell_causes_apart(self, once):
        (layered,) = once("tokens").layers
        everything, own, *others = (layer.cells for layer in layered.layers)
        assert torch.equal(own | torch.stack(others).any(0), everything)
        assert (own.sum((-2, -1)) == 20).all()
        for q, cells in enumerate(others):
            assert not cells[:, q].any()
            assert (cells.sum((1, 2, 3)) == 40).all()

    def test_the_table_counts_what_is_drawn(self, once):
        (layered,), (table,) = once("tokens").layers, once("tokens").tables
        assert list(table.rows[0][2:]) == layered.layers[0].cells[0].sum((-2, -1)).tolist()
        assert [row[2 + q] for q, row in enumerate(table.rows[1:4])] == [20, 20, 20]


class TestOffsets:
    @pytest.fixture
    def shifts(self, model):
        torch.manual_seed(0)
        scale = {"offset_range": 2.0, "grid_size": GRID}
        return offsets.Shifts(2 * torch.randn(2, 3, 4, 2).tanh(), **scale)

    def test_arrows_end_where_deformable_sample_samples(self, shifts):
        before_tanh = (shifts.shifts.double() / 2).atanh()
        ramp = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in GRID))  # (N, 2): row, column
        for m in range(3):
            found = ops.deformable_sample(ramp.expand(2, -1, -1).contiguous(), before_tanh[:, m], GRID, 2.0)
            torch.testing.assert_close(shifts.sampled[:, m].flatten(1, 2).double(), found, rtol=0, atol=1e-5)

    def test_points_that_do_not_move_are_the_reference_points_where_these_lie_in_the_map(self, shifts):
        still = offsets.Shifts(torch.zeros(1, 2, 4, 2), GRID, 2.0)
        inside = (still.references <= still.references.new_tensor([15, 7])).all(-1)
        assert torch.equal(still.sampled[0, 0][inside], still.references[inside])
        assert int(inside.sum()) == 3  # the last row and the last column lie beyond

    def test_the_offsets_are_those_of_the_model(self, model):
        shown = Samples().chosen(2)
        with torch.no_grad():
            found = offsets.find_shifts(model, shown.inputs, shown.cameras)
            expected = model.local_alignment.offsets(model.encode(shown.inputs, shown.cameras).tokens)
        torch.testing.assert_close(found.shifts, 2 * expected.tanh())

    def test_every_image_of_a_row_shows_the_places_of_that_rows_modality(self, model, once):
        picture, shown = once("offsets"), Samples().chosen(3)
        with torch.no_grad():
            found = offsets.find_shifts(model, shown.inputs, shown.cameras)
        for m in range(3):
            expected = offsets.in_pixels(found.sampled[1, m], GRID, AREA).flatten(0, 1).flip(1)
            for n in range(3):
                axes = picture.figure.axes[9 + 3 * m + n]  # of the second sample
                torch.testing.assert_close(torch.as_tensor(axes.lines[-1].get_xydata()), expected.double())
                assert len(axes.lines) == (2 if m == n else 1)  # reference points over its own image alone

    def test_the_distribution_is_over_all_samples(self, model, once):
        samples, table = Samples(), once("offsets").tables[0]
        assert table.title == "Shifts of 8 samples"
        with torch.no_grad():
            found = offsets.find_shifts(model, samples.shown.inputs, samples.shown.cameras).shifts[:, 1]
        assert table.rows[1][0] == "NI"
        assert table.rows[1][1] == pytest.approx(found.mean().item(), abs=1e-6)
        assert table.rows[1][4:6] == pytest.approx([found.min().item(), found.max().item()], abs=1e-6)


class TestVolumes:
    @pytest.fixture
    def found(self, model):
        shown = Samples().shown
        with torch.no_grad():
            return volumes.find_volumes(model, shown.inputs, shown.identities, shown.cameras)

    def test_the_matrix_holds_the_root_of_each_gram_determinant(self, model, found):
        shown = Samples().shown
        with torch.no_grad():
            x = F.normalize(model.encode(shown.inputs, shown.cameras).tokens.double().mean(2), dim=-1)
        for i in range(4):
            for j in range(4):
                vectors = torch.stack([x[i, 0], x[j, 1], x[j, 2]])
                expected = torch.linalg.det(vectors @ vectors.T).clamp_min(0).sqrt()
                assert found.volumes[i, j].item() == pytest.approx(expected.item(), rel=1e-3, abs=1e-5)

    def test_the_loss_at_the_models_temperature_is_the_models(self, model, found):
        shown = Samples().shown
        with torch.no_grad():
            expected = model.global_alignment(model.encode(shown.inputs, shown.cameras).tokens)
        assert found.loss == pytest.approx(expected.item(), rel=1e-5)

    def of(self, matrix, identities=None):
        identities = torch.arange(len(matrix)) if identities is None else identities
        return volumes.Volumes(matrix.double(), identities, (0.5, 0.5, 0.5), 0.07, 0.1)

    def test_equal_volumes_are_guessing(self):
        alike = self.of(torch.full((6, 6), 0.3))
        assert alike.loss == pytest.approx(math.log(6))
        assert alike.way == pytest.approx(0)
        assert "no better apart than guessing" in volumes.remarks(alike)[0]
        assert not alike.worth_it

    def test_the_least_loss_is_reached_where_the_softmax_is_the_smoothed_target(self):
        target = 0.9 * torch.eye(6) + 0.1 / 6
        best = self.of(-0.07 * target.log())
        assert best.loss == pytest.approx(best.least)
        assert best.way == pytest.approx(1)
        assert "100% of the way" in volumes.remarks(best)[0]
        assert best.best[0] == pytest.approx(0.07, rel=0.06)

    def test_a_match_is_counted_by_rows_and_columns_and_identities_with_their_others(self):
        matrix = torch.tensor([[0.1, 0.2, 0.9], [0.1, 0.3, 0.9], [0.9, 0.9, 0.0]])
        found = self.of(matrix, torch.tensor([0, 0, 1]))
        assert found.found == pytest.approx((4 / 6, 1.0))  # row 1 and column 1 find the other sample of the identity
        assert {name: len(values) for name, values in found.groups.items()} == {
            "matched": 3,
            "same identity": 2,
            "other identity": 4,
        }


class TestAttention:
    def test_the_interactions_attention_is_multi_head_attention_over_masked_tokens(self):
        torch.manual_seed(0)
        B, M, N, C, heads = 2, 3, 5, 12, 4
        interaction, theirs = CrossModalInteraction(C, heads), nn.MultiheadAttention(C, heads, batch_first=True)
        nn.init.normal_(interaction.qkv.bias)
        theirs.in_proj_weight.data, theirs.in_proj_bias.data = interaction.qkv.weight.data, interaction.qkv.bias.data
        x, mask, cls = torch.randn(B, M, N, C), torch.rand(B, M, N) < 0.6, torch.randn(B, M, C)
        with torch.no_grad():
            ours = attention.interaction_attention(interaction, x, mask, cls)
            masked = (x * mask[..., None]).flatten(1, 2)
            _, expected = theirs(cls, masked, masked, average_attn_weights=False)  # (B, heads, M, M * N)
        torch.testing.assert_close(ours.flatten(-2), expected)

    def test_the_backbones_attention_is_that_of_its_own_operator(self, model):
        shown, seen = Samples().shown, []
        images, cameras = shown.inputs.flatten(0, 1), shown.cameras.repeat_interleave(3)
        modules = [block.attention for block in model.backbone.blocks]
        hooks = [module.register_forward_hook(lambda m, x, _: seen.append((m, x[0]))) for module in modules]
        with torch.no_grad():
            model.backbone(images, cameras)
            for hook in hooks:
                hook.remove()
            ours = model.backbone.class_attention(images, cameras, last=5)
            for block, (module, x) in enumerate(seen):
                q, k, _ = module.qkv(x).unflatten(-1, (3, 3, 16)).permute(2, 0, 3, 1, 4)
                values = torch.eye(129).expand(*k.shape[:2], -1, -1)  # which make of an output its probabilities
                expected = F.scaled_dot_product_attention(q, k, values)[:, :, 0, 1:]
                torch.testing.assert_close(ours[block], expected, rtol=1e-4, atol=1e-6)

    def test_what_is_drawn_sums_to_one_over_all_modalities(self, model):
        shown = Samples().chosen(2)
        with torch.no_grad():
            found = attention.find_attended(model, shown.inputs, shown.cameras)
        torch.testing.assert_close(found.interaction.sum((2, 3, 4)), torch.ones(2, 3))
        assert found.backbone.shape == (2, 2, 3, *GRID)
        assert (found.backbone.sum((-2, -1)) < 1).all()

    def test_the_table_says_what_dropped_tokens_get(self, model):
        shown = Samples().chosen(1)
        with torch.no_grad():
            found = attention.find_attended(model, shown.inputs, shown.cameras)
        table = attention.numbers(found, shown.names, Samples().modalities)
        row = table.rows[1]
        assert row[1] == "SIM, NI's class token"
        assert row[5] == pytest.approx(found.interaction[0, 1][~found.kept[0]].sum().item(), rel=1e-5)
        assert sum(row[2:5]) == pytest.approx(1, rel=1e-5)

    def test_even_attention_is_spread_over_all_tokens(self):
        assert attention.spread(torch.full((3, 4, 2), 0.1)) == pytest.approx(24)
