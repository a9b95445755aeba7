"""The benchmark of SIM, GAM and LAM runs, checks first, and says nothing when the check fails."""

import json

import pytest
import torch

SMALL = ["--batch", "4", "--runs", "2", "--warmup", "0", "--device", "cpu"]


@pytest.fixture
def modules(script):
    return script("modules")


def test_each_module_and_each_sum_gets_a_row_per_precision(modules, tmp_path):
    assert modules.main([*SMALL, "--precision", "fp32", "bf16", "--json", str(tmp_path / "out.json")]) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    groups = ["SIM", "GAM", "LAM", "GAM + LAM", "SIM + GAM + LAM"]
    assert [(r["modules"], r["implementation"]) for r in rows] == [
        (group, f"ours {precision}") for group in groups for precision in ("fp32", "bf16")
    ]
    assert all(0 < r["p20_ms"] <= r["p50_ms"] <= r["p80_ms"] and r["device"] for r in rows)


def test_wrong_results_are_reported_without_a_time(modules, tmp_path, monkeypatch, capsys):
    with_weights = modules.with_weights

    def oracle_off_by_one_percent(*arguments):
        side = with_weights(*arguments)
        if side.tokens[0].dtype == torch.float64:
            with torch.no_grad():
                side.modules["local_alignment"].window_weight.mul_(1.01)
        return side

    monkeypatch.setattr(modules, "with_weights", oracle_off_by_one_percent)
    assert modules.main([*SMALL, "--json", str(tmp_path / "out.json")]) == 1
    output = capsys.readouterr()
    assert output.err.startswith("error: LAM")
    assert "_ms" not in output.out
    assert not list(tmp_path.iterdir())


class AlignmentOffInSinglePrecision(torch.nn.Module):
    """A loss whose gradient of the temperature is off in fp32, by a factor that is another for every input."""

    def __init__(self, errors):
        super().__init__()
        self.temperature = torch.nn.Parameter(torch.tensor(0.07))
        self.errors = list(errors)

    def forward(self, tokens):
        error = self.errors.pop(0) if tokens.dtype == torch.float32 else 0.0
        return self.temperature * (1 + error)


def test_the_temperature_s_gradient_is_held_against_fp64(modules):
    off = AlignmentOffInSinglePrecision([2e-3] * modules.TEMPERATURE_DRAWS)
    with pytest.raises(modules.WrongResultError, match=r"global_alignment\.temperature: median relative error 2\.0"):
        modules.check_temperature(off, (2, 3, 4, 8), seed=1)


def test_one_input_for_which_the_temperature_s_gradient_is_nearly_zero_does_not_matter(modules):
    errors = [0.5] + [1e-5] * (modules.TEMPERATURE_DRAWS - 1)
    modules.check_temperature(AlignmentOffInSinglePrecision(errors), (2, 3, 4, 8), seed=1)


def test_samples_whose_selection_hangs_on_rounding_are_drawn_again(modules):
    generator = torch.Generator().manual_seed(0)
    encoded = torch.randn(3, 3, 129, 512, generator=generator)
    selection = modules.SelectiveInteraction(512, modules.K_INTRA).selection
    modules.redraw_near_ties(selection, encoded, generator)
    decided = encoded.clone()
    order = (encoded[1, 2, 1:] @ encoded[1, 2, 0]).argsort(descending=True)
    last_kept, first_dropped = 1 + order[modules.K_INTRA - 1], 1 + order[modules.K_INTRA]
    encoded[1, 2, last_kept] = encoded[1, 2, first_dropped]
    assert modules.score_gaps(selection, encoded)[1] == 0
    modules.redraw_near_ties(selection, encoded, generator)
    assert modules.score_gaps(selection, encoded).min() >= modules.LEAST_GAP
    assert [torch.equal(*pair) for pair in zip(encoded, decided, strict=True)] == [True, False, True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "1"], "error: --batch must be at least 4, got 1"),
        (["--upstream", "no/such"], "error: --upstream must name a checkout of the authors' Signal, got no/such"),
    ],
)
def test_a_bad_option_is_one_line_and_exit_code_2(modules, capsys, arguments, message):
    assert modules.main([*SMALL, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1
