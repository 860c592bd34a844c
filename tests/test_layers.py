"""The map of the code, kept true: who may import whom, how long things may be, and that importing does nothing."""

import ast
import graphlib
import json
import os
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.conftest import ROOT, program

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# A module imports only from layers above its own line.
LAYERS = (
    ("leaves, standard library only",
     "__init__ errors faults paths schedule hardware conversation presets watch calculator sandbox_child zh_text"),
    ("pure rules and texts on the leaves", "recipe builtin files packing sandbox text_quality dedup gpt_config"),
    ("command line, log, raw data, charts", "cli log records charts scaling report_data report_page foreign cleaning"),
    ("the hub's files", "hub"),
    ("data and tokens, one external library each", "sources tokenizer"),
    ("made of them", "corpus conversation_files report tokenizer_training vocabulary"),
    ("tokens of a corpus, choosing tokens, still no torch", "token_store contamination sampling quantize"),
    ("torch, one idea each", "compute attention cross_entropy kv_cache ngrams"),
    ("the model and its batches", "gpt dataloader prepare batching ngram_counts"),
    ("parts that need a model", "optim objectives native torch_decoder loss_eval budget gpt2"),
    ("checkpoints hold model and optimizer", "checkpoint engine"),
    ("what a training run is given and carries along", "plan export lora"),
    ("the loop, and the model as a partner to talk to", "trainer chat rollout"),
    ("whole activities", "run hooks task_eval engine_speed server"),
    ("fine-tuning, of all these", "tuning"),
)  # fmt: skip
LAYER = {name: i for i, (_, names) in enumerate(LAYERS) for name in names.split()}
# The last that do without torch, and that tasks may use.
TITLES = [title for title, _ in LAYERS]
NO_TORCH = TITLES.index("tokens of a corpus, choosing tokens, still no torch")
FOR_TASKS = TITLES.index("pure rules and texts on the leaves")

MODULE_LINES, SCRIPT_LINES, FUNCTION_LINES, TOTAL_LINES = 400, 150, 60, 16_547
TRACKED_LINES = 26_361  # of all Python, tests included
SHIPPED = ("nanozhchat", "scripts", "tasks")
PACKAGE = ROOT / "nanozhchat"


def sources(*folders):
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def length(path):
    return len(path.read_text(encoding="utf-8").splitlines())


def unit(path):
    """Name a file's module of the map: a sub-package counts as one."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path, tree=None):
    """Yield the dotted name of everything a file imports, inside functions too; `from a import b` gives a.b."""
    for node in ast.walk(tree or parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def top_imports(path, tree=None):
    return {name.split(".")[0] for name in imports(path, tree)}


def optional_imports(path):
    """Top names whose absence a file handles: imported in a `try` with an `except ImportError`."""
    tries = (n for n in ast.walk(parsed(path)) if isinstance(n, ast.Try))
    handled = (n for n in tries if any(h.type and "ImportError" in ast.unparse(h.type) for h in n.handlers))
    return {name for n in handled for statement in n.body for name in top_imports(path, statement)}


def package_imports(path):
    """Modules of the map that a file imports."""
    names = [f"{name}.".split(".")[1] for name in imports(path) if name.split(".")[0] == "nanozhchat"]
    return {name if name in LAYER else "__init__" for name in names}


def test_every_module_has_its_place_on_the_map():
    assert {unit(p) for p in sources("nanozhchat")} == set(LAYER)


@pytest.mark.parametrize(
    "path",
    [p for p in sources("nanozhchat") if p != PACKAGE / "__init__.py"],  # that one: the next test
    ids=lambda p: str(p.relative_to(PACKAGE)),
)
def test_a_module_imports_only_lower_layers(path):
    name = unit(path)
    for dep in package_imports(path) - {name}:
        assert LAYER[dep] < LAYER[name], f"{name} imports {dep}, which is not in a lower layer: move code down"


def test_the_package_itself_imports_nothing_of_its_own_until_asked():
    found = [ast.unparse(n) for n in parsed(PACKAGE / "__init__.py").body if isinstance(n, ast.Import | ast.ImportFrom)]
    assert found == [name for name in found if name.startswith("from typing ")] != []


@pytest.mark.parametrize("package", ["builtin", "server"])
def test_files_of_a_sub_package_do_not_import_in_a_circle(package):
    graph, prefix = {}, f"nanozhchat.{package}."
    for path in (PACKAGE / package).glob("*.py"):
        graph[path.stem] = {n.removeprefix(prefix).split(".")[0] for n in imports(path) if n.startswith(prefix)}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) > 1


def test_nothing_below_imports_what_is_above_the_package():
    rest = {"scripts", "tests"}
    above = {"nanozhchat": rest | {"tasks"}, "tasks": rest, "scripts": rest}
    assert [path for folder, names in above.items() for path in sources(folder) if top_imports(path) & names] == []
    for path in sources("tasks"):
        assert [dep for dep in package_imports(path) if LAYER[dep] > FOR_TASKS] == [], path


PROBE = """
import importlib, json, os, sys
before = dict(os.environ)
for name in sys.argv[1:]:
    importlib.import_module(name)
changed = sorted(k for k in before.keys() | os.environ.keys() if before.get(k) != os.environ.get(k))
sys.stderr.write(json.dumps({"torch": "torch" in sys.modules, "environment": changed}))
"""


def import_in_fresh_process(names, folder):
    """Import modules where every place to write is an empty folder; returns findings, stdout and other stderr."""
    places = dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "NANOZHCHAT_BASE_DIR"), str(folder))
    env = {**os.environ, **places, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = program([sys.executable, "-c", PROBE, *names], folder, env=env)
    assert done.returncode == 0, done.stderr
    said, brace, found = done.stderr.rpartition("{")
    return json.loads(brace + found), done.stdout, said


def test_importing_every_module_and_script_writes_prints_and_sets_nothing(tmp_path):
    (folder := tmp_path / "empty").mkdir()
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in sources(*SHIPPED)]
    found, out, said = import_in_fresh_process([n.removesuffix(".__init__") for n in names], folder)
    assert (out, said, list(folder.rglob("*"))) == ("", "", [])
    assert [k for k in found["environment"] if k.startswith(("NANOZHCHAT", "OMP", "CUDA", "PYTORCH", "HF_"))] == []


def test_the_lower_half_of_the_map_needs_no_torch(tmp_path):
    names = [f"nanozhchat.{name}" for name, layer in LAYER.items() if layer <= NO_TORCH and name != "__init__"]
    assert import_in_fresh_process(names, tmp_path)[0]["torch"] is False


def test_no_module_script_or_function_is_longer_than_its_budget():
    limits = {"nanozhchat": MODULE_LINES, "tasks": MODULE_LINES, "scripts": SCRIPT_LINES}
    assert [path for folder, most in limits.items() for path in sources(folder) if length(path) > most] == []
    nodes = ((path, node) for path in sources(*limits) for node in ast.walk(parsed(path)))
    functions = ((p, n) for p, n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    assert [(p, n.name) for p, n in functions if n.end_lineno - n.lineno + 1 > FUNCTION_LINES] == []


def test_all_python_stays_small_what_users_install_and_together():
    assert sum(map(length, sources(*SHIPPED))) < TOTAL_LINES
    listed = program(["git", "ls-files", "-z", "*.py"])
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    assert Path(__file__) in paths
    assert sum(length(path) for path in paths if path.exists()) < TRACKED_LINES


def test_every_import_is_a_declared_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

    def declared(*lists: list[str]) -> set[str]:
        names = (re.split(r"[\s<>=!~;\[]", r, maxsplit=1)[0] for requirements in lists for r in requirements)
        return {name.lower().replace("_", "-") for name in names}

    shipped = declared(project["project"]["dependencies"], *project["project"]["optional-dependencies"].values())
    dev = shipped | declared(*project["dependency-groups"].values())
    known = packages_distributions()
    own = {*SHIPPED, "dev", "tests", "tomli"}  # tomli: comes with pytest where Python is too old to have tomllib
    missing = {}
    for path in sources(*SHIPPED, "tests"):
        for top in top_imports(path) - set(sys.stdlib_module_names) - own:
            names = {d.lower().replace("_", "-") for d in known.get(top, [top])}
            allowed = dev if "tests" in path.parts or top in optional_imports(path) else shipped
            if not names & allowed:
                missing.setdefault(top, []).append(str(path.relative_to(ROOT)))
    assert missing == {}
