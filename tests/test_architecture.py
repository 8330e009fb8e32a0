"""The shape of the house: who may import whom, how a recipe looks, how fast the package comes up."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

PACKAGE = ROOT / "src/hfspeech"

# A module imports only from lower levels.
LEVELS = {
    "errors": 0, "hardware": 0,
    "text": 1, "spelling": 1,
    "arguments": 1, "audio": 1, "hub": 1, "modeling": 1,
    "augment": 2, "data": 2, "metrics": 2, "models": 2, "runs": 2,
    "batching": 3, "voices": 3,
    "inference": 4, "training": 4, "publish": 4, "synthesis": 4,
    "comparison": 5, "preflight": 5, "reproduction": 5,
    "cli": 6,
}  # fmt: skip


def module_name(path):
    """Returns the top module that a file belongs to: data/rows.py is part of data."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path):
    """Yields the modules of this package that a file imports, at the top or inside a function."""
    inside = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = inside[: len(inside) - (node.level - 1)]
            target = [*base, *(node.module or "").split(".")]
            if target[0]:
                yield target[0]
            else:
                yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hfspeech"):
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("hfspeech."))


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def test_every_module_has_a_level():
    assert {module_name(path) for path in FILES} == set(LEVELS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    own = module_name(path)
    for other in imported_modules(path):
        assert other == own or LEVELS[other] < LEVELS[own], f"{own} imports {other}"


@pytest.mark.parametrize(
    "statement", ["import hfspeech", "import hfspeech.cli", "import hfspeech.errors, hfspeech.text"]
)
def test_light_imports_load_no_torch(statement):
    code = f"{statement}; import sys; sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


RECIPES = sorted(path.parent for path in (ROOT / "recipes").glob("*/run.py"))


@pytest.mark.parametrize("folder", RECIPES, ids=lambda folder: folder.name)
def test_a_recipe_is_a_story(folder):
    """One function of at most 70 lines, without `if`, `for` or `try`, and nothing shared by copy."""
    tree = ast.parse((folder / "run.py").read_text())
    functions = [
        node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
    ]
    assert [f.name for f in functions] == ["main"]
    (main,) = functions
    assert main.end_lineno - main.lineno + 1 <= 70
    turns = (ast.If, ast.For, ast.While, ast.Try, ast.With, ast.IfExp, ast.comprehension, ast.Match)
    assert not [node for node in ast.walk(main) if isinstance(node, turns)]
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    files = {path.name for path in folder.iterdir() if path.name != "__pycache__"}
    assert {"run.py", "args.yaml", "demo.yaml", "README.md"} <= files
    assert "__init__.py" not in files


@pytest.mark.parametrize("family", ["whisper", "speecht5"])
def test_recipes_differ_only_in_their_idea(family):
    """The story of full fine-tuning is that of LoRA without the adapter."""
    full, lora = (
        (ROOT / "recipes" / f"{family}_{method}" / "run.py").read_text().splitlines() for method in ("full", "lora")
    )
    own = [line for line in full if line not in lora and f"recipes/{family}_full/" not in line]
    starts = [
        '"""Teach ',
        "from hfspeech.arguments import",
        "    data_args, model_args, train_args = parse(",
        "    # Model: ",
    ]
    assert [line.startswith(start) for line, start in zip(own, starts)] == [True] * 4 and len(own) == 4


def test_the_top_level_is_as_planned():
    listed = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in listed.stdout.splitlines()}
    assert top - {".ci", ".gitignore"} == {
        "recipes", "src", "tests", "docs", "assets", "bench", "requirements.txt", "setup.cfg", "pyproject.toml", "Makefile",
        "README.md", "LICENSE",
    }  # fmt: skip
