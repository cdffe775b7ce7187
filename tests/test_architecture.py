"""The arrows between the packages: benchmarks -> interop -> jax_lora -> pallas_kernels -> jax."""

import ast
import importlib
import pathlib
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("pallas_kernels", "jax_lora", "interop")


MODULES = "print(*{name.partition('.')[0] for name in __import__('sys').modules})\n"


def output_of(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def imports(path: pathlib.Path) -> set[str]:
    """Top-level modules that the source imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            found.add(node.module)
    return {name.partition(".")[0] for name in found}


def test_importing_a_package_stays_below_it():
    """One interpreter imports one after the other, from below, with all their names."""
    above = {
        "pallas_kernels": {"flax", "torch", "jax_lora", "interop", "benchmarks"},
        "jax_lora": {"torch", "interop", "benchmarks"},
        "interop": {"benchmarks"},
    }
    code = "".join(f"import {package}; dir({package})\n{MODULES}" for package in above)
    lines = output_of(code).splitlines()
    for (package, forbidden), line in zip(above.items(), lines, strict=True):
        loaded = set(line.split())
        assert {package, "jax"} <= loaded
        assert not loaded & forbidden


def test_importing_a_package_waits_for_nothing():
    """Their names are imported at first use, so that the command line starts at once."""
    loaded = set(output_of(f"import jax_lora, pallas_kernels\n{MODULES}").split())
    assert {"jax_lora", "pallas_kernels"} <= loaded
    assert not loaded & {"jax", "jaxlib", "numpy", "flax"}


@pytest.mark.parametrize("name", ["jax_lora", "pallas_kernels"])
def test_a_package_has_the_names_of_its_api(name):
    package, api = (importlib.import_module(module) for module in (name, f"{name}.api"))
    public = {name for name in vars(api) if not name.startswith("_")}
    assert public <= {*dir(package)}
    assert all(getattr(package, name) is getattr(api, name) for name in public)
    starred: dict[str, object] = {}
    exec(f"from {name} import *", starred)
    assert public <= {*starred}
    with pytest.raises(AttributeError, match=f"module '{name}' has no attribute 'nothing'"):
        _ = package.nothing
    assert not hasattr(package, "no name") and not hasattr(package, "a.b")


@pytest.mark.parametrize(
    ("package", "allowed"),
    [("pallas_kernels", {"jax", "numpy", "jaxtyping", "pallas_kernels"})],
)
def test_sources_import_nothing_else(package, allowed):
    sources = sorted((ROOT / package).rglob("*.py"))
    assert sources
    for path in sources:
        assert imports(path) - sys.stdlib_module_names <= allowed, path


@pytest.mark.parametrize(
    ("below", "above"),
    [
        ("pallas_kernels", {"jax_lora", "interop", "benchmarks"}),
        ("jax_lora", {"interop", "torch", "benchmarks"}),
        ("interop", {"benchmarks"}),
    ],
)
def test_no_source_imports_what_stands_above_it(below, above):
    sources = sorted((ROOT / below).rglob("*.py"))
    assert sources
    for path in sources:
        assert not imports(path) & above, path


def test_the_wheel_holds_the_packages_and_nothing_else():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"] == {"packages": [*PACKAGES]}


def test_tests_holds_nothing_but_tests():
    """Scripts are in tools/ and benchmarks/; what tests share is imported by one of them. In peers/
    is what runs other projects' tests."""
    folder = ROOT / "tests"
    tests = [path for path in folder.rglob("*.py") if path.name.startswith("test_")]
    shared = set().union(*map(imports, tests))
    peers = {*(folder / "peers").iterdir()}
    rest = {*folder.rglob("*.py"), *folder.rglob("*.sh")} - {*tests} - peers
    assert {path.stem for path in rest} - shared == {"conftest"}


def test_tests_mirrors_the_packages():
    """A folder with a package's name must be no package: it would be imported in its place."""
    folder = ROOT / "tests"
    assert not [*folder.rglob("__init__.py")]
    rooms = {path.parent.relative_to(folder) for path in folder.rglob("test_*.py")}
    strangers = {room for room in rooms if not (ROOT / room / "__init__.py").is_file()}
    assert strangers == {pathlib.Path(), pathlib.Path("gpu")}


def test_there_is_no_utils():
    folders = [*PACKAGES, "benchmarks", "tests", "notebooks", "tools"]
    named = [p for folder in folders for p in (ROOT / folder).rglob("utils*")]
    assert not named
