"""Importing a checkout whose packages are missing, and leaving no trace of it. The checkout here is a made-up one."""

import sys

import pytest
import torch


@pytest.fixture
def upstream(script):
    return script("harness.upstream")


@pytest.fixture
def checkout(tmp_path):
    """A package `modeling` and a module `utils` importing what a machine may lack; a package `json` of their own."""
    files = {
        "modeling/__init__.py": "from .net import answer",
        "modeling/net.py": (
            "import ftfy, regex as re\n"
            "from fvcore.nn.jit_handles import elementwise_flop_counter\n"
            "from timm.models.registry import register_model\n"
            "from torchvision.transforms import InterpolationMode\n"
            "import utils\n"
            "BICUBIC = InterpolationMode.BICUBIC\n"
            "PATTERN = re.compile('x', re.IGNORECASE)\n"
            "@register_model\n"
            "def answer():\n"
            "    return 42\n"
        ),
        "utils/__init__.py": "print('importing')",
        "json/__init__.py": "THEIRS = True",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_missing_packages_get_stand_ins_and_the_code_works(upstream, checkout, capsys):
    modules = upstream.load_modules(checkout, {"net": "modeling.net"})
    assert modules["net"].answer() == 42
    assert capsys.readouterr().out == ""


def test_what_their_plots_need_is_replaced_even_where_it_is_installed(upstream, checkout):
    import matplotlib

    (checkout / "utils" / "__init__.py").write_text(
        "import matplotlib.pyplot as plt\nfrom scipy.integrate import simps"
    )
    upstream.load_modules(checkout, {"utils": "utils"})
    assert sys.modules["matplotlib"] is matplotlib


def test_what_an_installed_package_has_not_is_not_there(upstream, checkout, tmp_path, monkeypatch):
    package = tmp_path / "installed" / "regex"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (checkout / "utils" / "__init__.py").write_text("try:\n  from regex import A\nexcept ImportError:\n  A = 0\n")
    monkeypatch.syspath_prepend(package.parent)
    assert upstream.load_modules(checkout, {"utils": "utils"})["utils"].A == 0
    sys.modules.pop("regex")


def test_nothing_of_it_stays_importable(upstream, checkout):
    before, path, finders = dict(sys.modules), list(sys.path), list(sys.meta_path)
    loaded = upstream.load_modules(checkout, {"json": "json", "net": "modeling.net"})
    assert loaded["json"].THEIRS
    assert (sys.path, sys.meta_path) == (path, finders)
    assert all(sys.modules[name] is module for name, module in before.items())
    left = {name for name in set(sys.modules) - set(before) if getattr(sys.modules[name], "__file__", None) is None}
    assert not {name.split(".")[0] for name in left} & {"modeling", "utils", *upstream.PACKAGES}
    assert "modeling" not in sys.modules


def test_a_failing_import_is_undone_too(upstream, checkout):
    (checkout / "modeling" / "net.py").write_text("raise OSError('no')")
    path, finders = list(sys.path), list(sys.meta_path)
    with pytest.raises(OSError, match="no"):
        upstream.load_modules(checkout, {"net": "modeling.net"})
    assert (sys.path, sys.meta_path) == (path, finders)
    assert "modeling" not in sys.modules


def test_another_directory_is_refused_in_one_line(upstream, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^--upstream must name a checkout .* \(no config\)$"):
        upstream.Upstream(tmp_path)


def test_configuration_merges_and_reads_literals(upstream, tmp_path):
    defaults = upstream.CfgNode(MODEL=upstream.CfgNode(NAME="a", SIZES=[1, 2]), OUT=".")
    config = defaults.clone()
    (tmp_path / "c.yml").write_text("MODEL:\n  NAME: ('RGBNT201')\n  SIZES: [3, 4]\n")
    config.merge_from_file(str(tmp_path / "c.yml"))
    assert (config.MODEL.NAME, config.MODEL.SIZES, config.OUT) == ("RGBNT201", [3, 4], ".")
    assert defaults.MODEL.NAME == "a"


def test_rearrange_splits_permutes_and_joins(upstream):
    x = torch.arange(48).view(2, 6, 2, 2)
    grouped = upstream.rearrange(x, "b (g c) h w -> (b g) c h w", g=2, c=3)
    assert torch.equal(grouped, x.view(4, 3, 2, 2))
    assert torch.equal(upstream.rearrange(x, "b p h w -> b h w p"), x.permute(0, 2, 3, 1))
