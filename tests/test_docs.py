"""The documentation: nothing public is left out, links lead somewhere, runnable blocks can fail."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
FENCED = re.compile(r"^(`{3,})[^\n]*\n.*?^\1$", re.MULTILINE | re.DOTALL)


def _module(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


hooks = _module("docs_hooks", ROOT / "docs" / "hooks.py")
runner = _module("ci_blocks", ROOT / ".ci" / "blocks.py")


# Nothing public is left out


def test_every_public_name_and_method_is_documented():
    assert hooks.all_problems() == []


@pytest.fixture
def fake():
    module = ModuleType("fake")
    source = (
        "__all__ = ['good', 'silent', 'Thing', 'CONSTANT']\n"
        "CONSTANT = object()\n"
        "def good():\n    'Says something.'\n"
        "def silent(): pass\n"
        "class Thing:\n"
        "    'Says something.'\n"
        "    def silent(self): pass\n"
        "    @property\n    def mute(self): pass\n"
        "    @classmethod\n    def dumb(cls): pass\n"
        "    def _hidden(self): pass\n"
    )
    exec(source, vars(module))
    return module


def test_missing_docstrings_are_named(fake):
    shown = [fake.good, fake.silent, fake.Thing, fake.CONSTANT]
    expected = ["fake.silent", "fake.Thing.silent", "fake.Thing.mute", "fake.Thing.dumb"]
    assert hooks.problems(fake, shown) == [f"{name} has no docstring" for name in expected]


def test_names_on_no_reference_page_are_named(fake):
    found = hooks.problems(fake, [fake.silent, fake.Thing])
    assert "fake.good is on no reference page" in found
    assert "fake.CONSTANT is on no reference page" in found
    assert "fake.Thing is on no reference page" not in found


def test_reference_pages_document_names_and_whole_modules():
    from featherweight import common, sparse

    pages = ["::: featherweight.sparse.hold.hold\n", "text\n\n::: featherweight.common"]
    shown = hooks.documented(pages)
    assert sparse.hold in shown
    assert common.prunable_weights in shown
    assert sparse.Masks not in shown


def test_a_function_named_as_its_module_is_not_documented_by_the_short_name():
    assert hooks.documented(["::: featherweight.sparse.hold"]) == []


def test_without_all_only_own_functions_and_classes_are_public():
    from featherweight import common

    names = hooks.public_names(common)
    assert "Registry" in names
    assert "Tensor" not in names
    assert "_patterns" not in names


def test_methods_without_a_page_are_named():
    pages = {"one.md": "# One\n\n### two\n"}
    assert hooks.homeless(["one", "two"], pages) == []
    (line,) = hooks.homeless(["one", "three"], pages)
    assert "'three'" in line


# Generated parts


@pytest.mark.parametrize("name", hooks.GENERATED)
def test_generated_parts_have_content_and_are_used(name):
    assert len(hooks.filled(f"<!-- generated: {name} -->")) > 100
    assert any(f"<!-- generated: {name} -->" in page.read_text("utf-8") for page in PAGES)


def test_generated_tables_hold_every_row():
    from featherweight.lab.data import DATA
    from featherweight.lab.parse import describe
    from featherweight.sparse import RESETS

    assert all(f"`{key}`" in hooks.GENERATED["fields"]() for key, _, _ in describe())
    assert all(f"`{name}`" in hooks.GENERATED["data"]() for name in DATA)
    assert all(f"`{name}`" in hooks.GENERATED["resets"]() for name in RESETS)


def test_cells_with_bars_stay_in_their_column():
    lines = hooks.table(("a", "b"), [("x|y", "arXiv:2402.19262")]).splitlines()
    assert lines[2] == "| x\\|y | [arXiv:2402.19262](https://arxiv.org/abs/2402.19262) |"


def test_unknown_generated_part_is_refused():
    with pytest.raises(ValueError, match="unknown generated part 'feilds': did you mean 'fields'"):
        hooks.filled("<!-- generated: feilds -->")


# Links


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_resolve(page):
    text = FENCED.sub("", page.read_text("utf-8"))
    targets = [link.partition("#")[0] for link in LINK.findall(text) if "://" not in link]
    missing = [target for target in targets if target and not (page.parent / target).exists()]
    assert missing == []


def test_the_link_pattern_finds_links():
    assert LINK.findall("[a](b.md#c) and [`d`](../e.md)") == ["b.md#c", "../e.md"]


# Runnable blocks


def _run(folder, text):
    page = folder / "page.md"
    page.write_text(text, "utf-8")
    command = [sys.executable, str(ROOT / ".ci" / "blocks.py"), str(page)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_blocks_share_names_and_a_fresh_folder(tmp_path):
    text = (
        "```python runnable\nfrom pathlib import Path\nx = 1\nassert not [*Path.cwd().iterdir()]\n"
        "Path('made').touch()\n```\n\n```bash runnable\ntest -f made\n```\n\n"
        "```python\nnot run\n```\n\n```python runnable\nassert x == 1\n```\n"
    )
    code, output = _run(tmp_path, text)
    assert (code, "3 blocks" in output) == (0, True), output
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]


@pytest.mark.parametrize(
    ("block", "line", "said"),
    [
        ("```python runnable\nprint('before')\nraise KeyError('k')\n```", 3, "before"),
        ("```python runnable\nimport warnings\nwarnings.warn('w')\n```", 3, "UserWarning"),
        ("```python runnable\nraise SystemExit(0)\n```", 3, "SystemExit"),
        ("```bash runnable\necho seen; false | true\n```", 3, "seen"),
        ("```bash runnable\necho $UNSET_NAME\n```", 3, "UNSET_NAME"),
        ("```perl runnable\n1\n```", 2, "'perl' is not one of python, bash"),
        ("```python runnable\nnever closed", 2, "never closed"),
    ],
)
def test_failing_blocks_are_named_with_line_and_output(tmp_path, block, line, said):
    code, output = _run(tmp_path, f"# Title\n{block}\n")
    assert code == 1
    assert f"page.md:{line}:" in output
    assert said in output


def test_tracebacks_name_the_line_of_the_page(tmp_path):
    _, output = _run(tmp_path, "a\n\nb\n```python runnable\nx = 1\n1 / 0\n```\n")
    assert "page.md:5: this python block failed" in output
    assert 'page.md", line 6' in output


def test_commands_of_this_environment_are_on_the_path(tmp_path):
    code, output = _run(tmp_path, "```bash runnable\ncommand -v featherweight\n```\n")
    assert code == 0, output


def test_pages_train_alike():
    """The training loop that method pages begin with is one text for methods of one kind."""
    for kinds in (("criterion", "construction", "loop"), ("dynamic",)):
        names = {name for kind in kinds for name in hooks.KINDS[kind]}
        loops = {
            block.code.partition("    with torch.no_grad():")[0]
            for page in ROOT.glob("docs/methods/*.md")
            for block in runner.blocks(page.read_text("utf-8"))
            if block.code.startswith("# Digits") and page.stem in names
        }
        assert len(loops) == 1, kinds
