"""The modules of the package import each other in one direction, and never in a circle."""

import ast
from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "corel_diffusers"
# A folder may import from itself and from the folders of earlier rows.
LAYERS = [
    ["files"],
    ["config", "plots", "internals", "trust", "saved_models"],
    ["models"],
    ["runtime"],
    ["losses", "data"],
    ["training", "sampling"],
]
LAYERS += [["evaluation"], ["hub", "environment"], ["decoder_tuning"], ["cli"], ["api"]]


def imports_of(module: str, source: str) -> Iterable[str]:
    """Return the modules of the package that a module imports, inside functions too, as "training.ema"."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = (name.name for name in node.names if name.name.split(".")[0] == "corel_diffusers")
            yield from (name.removeprefix("corel_diffusers.") for name in names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError(f"{module}: a relative import")
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "corel_diffusers":
            parent = node.module.removeprefix("corel_diffusers").lstrip(".")
            for name in node.names:
                child = f"{parent}.{name.name}".lstrip(".")
                found = child if PACKAGE.joinpath(*child.split(".")).with_suffix(".py").is_file() else parent
                if found:  # not __version__ of the package itself
                    yield found


def check(sources: dict[str, str]) -> None:
    """Raise AssertionError for an import against the layers, CycleError for a circle."""
    layer_of = {folder: layer for layer, folders in enumerate(LAYERS) for folder in folders}
    graph = {module: set(imports_of(module, source)) - {module} for module, source in sources.items()}
    for module, imported in graph.items():
        folder = module.split(".")[0]
        for other in (name.split(".")[0] for name in imported):
            assert other == folder or layer_of[other] < layer_of[folder], f"{module} imports {sorted(imported)}"
    TopologicalSorter(graph).prepare()


def package_sources() -> dict[str, str]:
    files = (file for file in PACKAGE.rglob("*.py") if file.name != "__init__.py")
    return {".".join(file.relative_to(PACKAGE).with_suffix("").parts): file.read_text("utf-8") for file in files}


def test_imports_point_one_way_and_have_no_circles():
    check(package_sources())


@pytest.mark.parametrize(
    ("module", "line", "error"),
    [
        ("losses.vae", "from corel_diffusers.training import ema", AssertionError),
        ("sampling.samplers", "def f():\n    from corel_diffusers.training.ema import EMA", AssertionError),
        ("models.vae", "import corel_diffusers.training.ema", AssertionError),
        ("data.cache", "from corel_diffusers.data.pixels import Pixels", CycleError),
    ],
)
def test_a_planted_import_is_found(module, line, error):
    sources = package_sources()
    with pytest.raises(error):
        check(sources | {module: f"{sources[module]}\n{line}\n"})


def test_the_pipeline_file_imports_nothing_of_the_package():
    assert not list(imports_of("pipeline", (PACKAGE.parent / "pipeline.py").read_text("utf-8")))
