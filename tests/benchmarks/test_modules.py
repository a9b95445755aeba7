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
    written = json.loads((tmp_path / "out.json").read_text())["rows"]
    rows = [row for row in written if "modules" in row]
    groups = ["SIM", "GAM", "LAM", "GAM + LAM", "SIM + GAM + LAM"]
    assert [(r["modules"], r["implementation"]) for r in rows] == [
        (group, f"ours {precision}") for group in groups for precision in ("fp32", "bf16")
    ]
    assert all(0 < r["p20_ms"] <= r["p50_ms"] <= r["p80_ms"] and r["device"] for r in rows)
    counted = {(r["module"], r["step"], r["implementation"]): r for r in written if "module" in r}
    assert len(counted) == len(written) - len(rows) == 2 * 2 * (3 * 2 + 3)
    for (module, step, implementation), row in counted.items():
        if implementation == "ours fp32":
            assert row["launches"] < counted[module, step, "eager fp32"]["launches"]
            assert row["must_MB"] == counted[module, step, "eager fp32"]["must_MB"]
            assert 0 < row["floor_us RTX 5090"] < row["estimate_us RTX 5090"]
    both = [counted["all three", step, "ours bf16"]["launches"] for step in ("forward", "backward", "both")]
    assert both[0] + both[1] == both[2]


def test_what_must_move_is_every_input_and_result_once(script):
    costs, counting = script("harness.module_costs"), script("harness.counting")
    with counting.without_values(), counting.as_on_a_gpu():
        subjects = costs.our_subjects(2, torch.float32)
        forward, backward = costs.must_move("GAM", subjects["GAM"], subjects["GAM"].passes(torch.float32))
    assert forward == 4 * (2 * 3 * 128 * 512 + 1 + 1)  # tokens, temperature and loss
    assert backward == 4 * (2 * 3 * 512 + 1 + 1)  # a gradient that is one vector for all tokens of a modality


class Sides:
    """Modules of ours in the authors' place, on real numbers."""

    class Alignment(torch.nn.Module):
        def __init__(self, gam, lam):
            super().__init__()
            self.gam, self.lam = gam, lam

        def Cls_Align(self, *tokens):  # noqa: N802 - the authors' name
            return self.gam(torch.stack(tokens, 1))

        def patch_Align(self, *tokens):  # noqa: N802 - the authors' name
            return self.lam(torch.stack(tokens, 1))

    class Interaction(torch.nn.Module):
        def __init__(self, sim):
            super().__init__()
            self.sim = sim

        def forward(self, *inputs):
            return self.sim(torch.stack(inputs[:3], 1), torch.stack(inputs[3:], 1))

    def __init__(self, costs):
        self.modules = [subject.module for subject in costs.our_subjects(4, torch.float32).values()]

    def selective_interaction(self, k):
        return self.Interaction(self.modules[0])

    def alignment(self, grid):
        return self.Alignment(*self.modules[1:])


def test_the_authors_modules_stand_beside_ours(script):
    costs = script("harness.module_costs")
    rows = list(costs.module_costs(4, {"fp32": torch.float32}, Sides(costs)))
    sides = ["ours fp32", "eager fp32", "upstream fp32"]
    assert [row["implementation"] for row in rows[:3]] == sides
    assert {row["module"] for row in rows if row["implementation"] == sides[2]} == {*costs.NAMES, "all three"}
    assert rows[2]["launches"] > rows[0]["launches"]


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
