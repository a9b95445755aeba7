"""What docs/search.md says of pgvector, on a server: the one that SIGNAL_REID_TEST_POSTGRES names, or pgserver's."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from signal_reid.search import Index

PAGE = (Path(__file__).parents[2] / "docs" / "search.md").read_text()


@pytest.fixture
def psql(tmp_path):
    """Runs SQL through the program psql and returns its rows of text."""
    server = os.environ.get("SIGNAL_REID_TEST_POSTGRES")
    if server is None:
        pgserver = pytest.importorskip("pgserver", reason="neither SIGNAL_REID_TEST_POSTGRES nor pgserver")
        database = pgserver.get_server(tmp_path / "postgres")
        server, program = database.get_uri(), Path(pgserver.__file__).parent / "pginstall" / "bin" / "psql"
    else:
        program = "psql"

    def call(sql):
        command = [program, server, "--quiet", "--no-psqlrc", "--no-align", "--tuples-only", "--set=ON_ERROR_STOP=1"]
        done = subprocess.run(command, input=sql, capture_output=True, text=True, timeout=60, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    yield call
    if "SIGNAL_REID_TEST_POSTGRES" in os.environ:
        call("DROP TABLE IF EXISTS items")
    else:
        database.cleanup()


def test_the_documented_way_into_pgvector_finds_what_the_index_finds(psql, make_index, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, features = make_index(30, 20, dimension=24, name="gallery.index")
    export = next(code for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "rows.tsv" in code)
    exec(export, {})
    (sql,) = re.findall(r"```sql\n(.*?)```", PAGE, re.DOTALL)
    torch.manual_seed(0)
    query = torch.nn.functional.normalize(features[3:4] + 0.3 * torch.randn(1, 24), dim=1)
    written = "[" + ",".join(f"{number:.6g}" for number in query[0].tolist()) + "]"
    rows = psql(sql.replace("3072", "24").replace("[...]", written))
    answers = [row.split("|") for row in rows if "|" in row]
    hits = Index("gallery.index").search(query, 10)[0]
    assert [name for name, _ in answers] == [hit.name for hit in hits]
    assert [float(score) for _, score in answers] == pytest.approx([hit.score for hit in hits], abs=1e-4)
