"""What the documents say about the code is so."""

import json
import re
from pathlib import Path

import pytest

from mikv_vllm.config import CompressionConfig
from mikv_vllm.tiers.calibrations import known
from mikv_vllm.tiers.formats import LADDER

ROOT = Path(__file__).parent.parent
DESIGN = (ROOT / "docs/design.md").read_text()


EXAMPLE = re.compile(r"```python\n(from mikv_vllm.*?)```\n\n```text\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize(("code", "printed"), EXAMPLE.findall(DESIGN), ids=["formats", "sealed"])
def test_numbers_of_the_design_are_what_their_code_prints(code, printed, capsys):
    exec(compile(code, "docs/design.md", "exec"), {})
    assert capsys.readouterr().out == printed


def test_tests_that_the_design_names_exist():
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"\b(test_\w+)`", DESIGN):
        assert f"def {name}(" in sources, name
    for path in re.findall(r"`(tests/[\w/]+(?:\.py)?)", DESIGN):
        assert (ROOT / path).exists(), path


def test_the_ladder_is_what_was_measured():
    measured = json.loads(
        (ROOT / "mikv_vllm/tiers/calibrated/smollm2-135m-instruct.json").read_text()
    )
    assert tuple(measured["low_formats"]) == tuple(low_format.name for low_format in LADDER)
    quality = (ROOT / "docs/quality.md").read_text()
    for point in measured["measured"]:
        row = f"| {point['name']} | {point['ratio']:.2f} | {point['divergence']:.5f} |"
        assert row in quality
    (calibration,) = (one for one in known() if one.model == measured["model"])
    assert f"{calibration.describe()}." in quality


def test_every_setting_is_documented():
    from mikv_vllm.server.options import FLAGS

    settings = (ROOT / "docs/settings.md").read_text()
    for name, field in CompressionConfig.model_fields.items():
        assert f"| `{FLAGS[name]}` | `{name}` | {field.default} |" in settings


def test_links_between_pages_exist():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md")]
    assert len(pages) > 10
    for page in pages:
        for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            if not link.startswith(("http://", "https://")):
                assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_index_has_every_page():
    index = (ROOT / "docs/README.md").read_text()
    for page in ROOT.glob("docs/*.md"):
        assert page.name == "README.md" or f"]({page.name})" in index, page.name


def test_the_readme_is_short_and_its_numbers_were_measured():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 125
    report = (ROOT / "docs/quality/report.md").read_text()
    results = ROOT / "benchmarks/results/2026-11-27.json"
    measured = {
        (f"{row['achieved_ratio']:.2f}", f"{row['divergence']:.4f}")
        for row in json.loads(results.read_text())["quality"]
        if row["dtype"] == "float16"
    }
    row = r"^\| (MiKV|stock|eviction).*\| (\d\.\d\d) \| (\d\.\d{4}) \|"
    rows = re.findall(row, readme, re.M)
    assert len(rows) == 5
    for kind, ratio, divergence in rows:
        if kind == "MiKV":
            assert (ratio, divergence) in measured
        else:
            assert re.search(rf"\| {ratio} \|[^|]* ?{divergence}", report), (ratio, divergence)
