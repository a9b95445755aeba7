"""Two runs of a benchmark side by side: rows find their partner by what was measured, other devices are refused."""

import json

import pytest


@pytest.fixture
def comparison(script):
    return script("harness.comparison")


@pytest.fixture
def main(script):
    return script("compare").main


@pytest.fixture
def write(tmp_path):
    def write(name, rows, device="A", threads=2):
        path = tmp_path / name
        path.write_text(json.dumps({"environment": {"device": device, "threads": threads}, "rows": rows}))
        return path

    return write


def test_rows_pair_by_names_and_sizes_and_give_the_ratio_of_medians(comparison, write):
    a = write("a.json", [{"step": "x", "batch": 8, "p50_ms": 2.0}, {"step": "x", "batch": 64, "p50_ms": 8.0}])
    b = write("b.json", [{"step": "x", "batch": 64, "p50_ms": 2.0}, {"step": "x", "batch": 8, "p50_ms": 3.0}])
    rows = comparison.compare(a, b)
    assert [(row["batch"], row["B/A p50_ms"]) for row in rows] == [(8, 1.5), (64, 0.25)]
    assert (rows[0]["A p50_ms"], rows[0]["B p50_ms"]) == (2.0, 3.0)


def test_results_do_not_tell_rows_apart(comparison, write):
    a = write("a.json", [{"op": "x", "p50_us": 2.0, "speedup": 3.0, "launches": 4, "peak_MiB": 10.0}])
    b = write("b.json", [{"op": "x", "p50_us": 1.0, "speedup": 6.0, "launches": 5, "peak_MiB": 5.0}])
    (row,) = comparison.compare(a, b)
    assert (row["B/A p50_us"], row["B/A peak_MiB"]) == (0.5, 0.5)


def test_rows_of_one_file_alone_are_listed(main, write, capsys):
    a = write("a.json", [{"step": "both", "p50_ms": 1.0}, {"step": "gone", "p50_ms": 1.0}])
    b = write("b.json", [{"step": "both", "p50_ms": 1.0}, {"step": "new", "p50_ms": 1.0}])
    assert main([str(a), str(b)]) == 0
    output = capsys.readouterr().out
    assert "step gone" in next(line for line in output.splitlines() if line.startswith("only in A"))
    assert "step new" in next(line for line in output.splitlines() if line.startswith("only in B"))
    assert "B/A 1 in the middle of 1 rows" in output


def test_different_devices_are_refused_unless_asked_for(comparison, main, write, capsys):
    a = write("a.json", [{"step": "x", "p50_ms": 1.0}], device="H100")
    b = write("b.json", [{"step": "x", "p50_ms": 4.0}], device="3090", threads=9)
    assert main([str(a), str(b)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the rows are of different devices (H100; 3090)")
    assert error.count("\n") == 1
    assert main([str(a), str(b), "--any-device"]) == 0
    assert comparison.compare(a, b, any_device=True)[0]["B/A p50_ms"] == 4.0


@pytest.mark.parametrize(("option", "code"), [("--compare", 2), ("--compare-devices", 0)])
def test_every_benchmark_compares_too(script, write, option, code, capsys):
    a = write("a.json", [{"step": "x", "p50_ms": 1.0}], device="H100")
    b = write("b.json", [{"step": "x", "p50_ms": 4.0}], device="3090")
    with pytest.raises(SystemExit) as stopped:
        script("metrics").main([option, str(a), str(b)])
    assert stopped.value.code == code
    assert capsys.readouterr().out.count("p50_ms: B/A 4") == (code == 0)


def test_files_with_nothing_in_common_are_refused(comparison, write):
    with pytest.raises(comparison.CompareError, match="have no row in common"):
        comparison.compare(write("a.json", [{"op": "x", "p50_us": 1.0}]), write("b.json", [{"op": "y", "p50_us": 1.0}]))


def test_rows_that_nothing_tells_apart_are_refused(comparison, write):
    a = write("a.json", [{"op": "x", "p50_us": 1.0}, {"op": "x", "p50_us": 2.0}])
    with pytest.raises(comparison.CompareError, match="nothing tells two rows apart"):
        comparison.compare(a, a)


@pytest.mark.parametrize("content", ["", "[]", '{"rows": []}', '{"environment": {}, "rows": [{}]}'])
def test_other_files_are_refused_in_one_line(main, write, tmp_path, content, capsys):
    (tmp_path / "a.json").write_text(content)
    assert main([str(tmp_path / "a.json"), str(write("b.json", []))]) == 2
    assert capsys.readouterr().err.endswith("a.json: not what a benchmark writes with --json\n")


def test_a_missing_file_is_named(main, write, tmp_path, capsys):
    assert main([str(tmp_path / "none.json"), str(write("b.json", []))]) == 2
    assert capsys.readouterr().err.endswith("none.json: no such file\n")
