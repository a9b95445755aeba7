"""The benchmark of search measures what it says, and its check can fail."""

import json

import pytest
import torch


def test_the_parts_of_a_row(script, tmp_path, capsys):
    search = script("search")
    settings = ["--items", "60", "--dimension", "8", "--runs", "3", "--kinds", "exact", "--task"]
    assert search.main([*settings, "build", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["peak_MiB"] > 0
    assert search.main([*settings, "measure", str(tmp_path)]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["kind"], row["items"], row["dimension"], row["found_share"]) == ("exact", 60, 8, 1)
    assert 0 < row["best_ms"] <= row["p50_ms"]
    index = search.Index(tmp_path / "exact")
    index.search = lambda queries, top: [hits[::-1] for hits in search.Index.search(index, queries, top)]
    with pytest.raises(search.WrongResultError):
        search.check(index, torch.randn(2, 8), "exact")
