"""What the documents say about the code is so."""

import json
import re
from pathlib import Path

from mikv_vllm.config import CompressionConfig
from mikv_vllm.tiers.formats import LADDER

ROOT = Path(__file__).parent.parent
DESIGN = (ROOT / "docs/design.md").read_text()


def test_byte_table_is_what_its_command_prints(capsys):
    code, printed = re.search(
        r"```python\n(from mikv_vllm.*?)```\n\n```text\n(.*?)```", DESIGN, re.DOTALL
    ).groups()
    exec(compile(code, "docs/design.md", "exec"), {})
    assert capsys.readouterr().out == printed


def test_tests_that_the_design_names_exist():
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"\b(test_\w+)`", DESIGN):
        assert f"def {name}(" in sources, name
    for path in re.findall(r"`(tests/[\w/]+(?:\.py)?)", DESIGN):
        assert (ROOT / path).exists(), path


def test_the_ladder_is_what_was_measured():
    measured = json.loads((ROOT / "docs/quality/low-formats.json").read_text())
    assert tuple(measured["low_formats"]) == tuple(low_format.name for low_format in LADDER)
    quality = (ROOT / "docs/quality.md").read_text()
    for point in measured["measured"]:
        row = f"| {point['name']} | {point['ratio']:.2f} | {point['divergence']:.5f} |"
        assert row in quality


def test_every_setting_is_in_the_readme():
    from mikv_vllm.server.options import FLAGS

    readme = (ROOT / "README.md").read_text()
    for name, field in CompressionConfig.model_fields.items():
        assert f"| `{FLAGS[name]}` | `{name}` | {field.default} |" in readme
