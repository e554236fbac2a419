"""The source tree itself: which module may import which, and that nothing read is ever executed or fetched."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

TIERS = [
    {"__main__"},
    {"commands"},
    {"study", "detector", "export", "doctor"},
    {"report"},
    {"evaluation", "robustness"},
    {"training", "scoring"},
    {"models", "data"},
    {
        "metrics",
        "checkpoint",
        "distributed",
        "cuda_graph",
        "parallel",
        "precision",
        "config",
        "fields",
        "arguments",
        "errors",
    },
    {"kernels"},
    {"__init__"},
]
"""From the command line down; a module imports from below its tier, or from its own package."""

BESIDE = {"training": "scoring", "scoring": "training", "data": "models"}
"""Arrows within one tier that would tie together what must stay apart."""

NETWORK = {"urllib", "requests", "http", "socket", "ftplib", "aiohttp", "httpx", "huggingface_hub", "ssl", "smtplib"}


def modules():
    """Yield (module name, path) of every source file, as installed: kernels/ is simsid.kernels."""
    for folder, prefix in ((ROOT / "simsid", "simsid"), (ROOT / "kernels", "simsid.kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join((prefix, *parts)).removesuffix(".__init__"), path


MODULES = dict(modules())
TREES = {name: ast.parse(path.read_text("utf-8")) for name, path in MODULES.items()}


def imports(name):
    """Yield every module that a module imports, wherever the statement stands, but for type checkers alone."""
    skipped = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            skipped |= {id(inner) for inner in ast.walk(node)}
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(TREES[name]):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base]).rstrip(".")
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield whole if whole in MODULES else base


def part(module):
    """Return a module's place in the tiers: the first name below simsid."""
    return module.split(".")[1] if "." in module else "__init__"


def tier(module):
    return next(i for i, names in enumerate(TIERS) if part(module) in names)


def arrows():
    for name in MODULES:
        for target in imports(name):
            if target.split(".")[0] == "simsid":
                yield name, target


def test_every_module_has_a_tier():
    known = set().union(*TIERS)
    assert {part(name) for name in MODULES} <= known, "give the new module a tier in TIERS"
    assert "simsid.training.trainer" in MODULES and "simsid.kernels.memory.reference" in MODULES


def test_imports_point_one_way():
    wrong = [
        f"{name} -> {target}"
        for name, target in arrows()
        if tier(target) < tier(name) or (tier(target) == tier(name) and BESIDE.get(part(name)) == part(target))
    ]
    assert not wrong
    assert len(list(arrows())) > 50


def strongly_connected(edges):
    """Return every group of two or more names that reach each other."""

    def reach(start):
        found, todo = set(), [start]
        while todo:
            for target in edges.get(todo.pop(), ()):
                if target not in found:
                    found.add(target)
                    todo.append(target)
        return found

    reached = {name: reach(name) for name in edges}
    return sorted(
        {tuple(sorted({n for n in reached if n in reached[name] and name in reached[n]})) for name in reached} - {()}
    )


def test_packages_form_no_cycle():
    edges = {}
    for name, target in arrows():
        if part(name) != part(target):
            edges.setdefault(part(name), set()).add(part(target))
    assert not strongly_connected(edges)


def test_modules_form_no_cycle():
    """Inside a package too; imports inside functions count. A package's `__init__` only re-exports, and is left out."""
    packages = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    edges = {}
    for name, target in arrows():
        if name not in packages and target not in packages:
            edges.setdefault(name, set()).add(target)
    assert not strongly_connected(edges)
    assert strongly_connected({"a": {"b"}, "b": {"a"}, "c": {"a"}}) == [("a", "b")]


def test_kernels_import_nothing_from_simsid():
    wrong = [
        f"{name} -> {target}"
        for name, target in arrows()
        if name.startswith("simsid.kernels") and not target.startswith("simsid.kernels")
    ]
    assert not wrong


@pytest.mark.parametrize("name", MODULES)
def test_nothing_is_fetched(name):
    assert not [target for target in imports(name) if target.split(".")[0] in NETWORK]


@pytest.mark.parametrize("name", MODULES)
def test_nothing_read_is_executed(name):
    calls = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.Call)]
    for call in calls:
        called = ast.unparse(call.func)
        assert called not in ("eval", "exec", "compile", "__import__"), f"line {call.lineno}: {called}"
        assert called.split(".")[0] not in ("pickle", "marshal", "shelve", "yaml", "joblib", "dill"), called
        if called in ("torch.load", "torch.hub.load", "torch.jit.load"):
            assert (name, called) == ("simsid.models.released", "torch.load")
            assert {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}["weights_only"] == "True"
        if called in ("np.load", "numpy.load"):
            assert not [keyword for keyword in call.keywords if keyword.arg == "allow_pickle"]
    loaders = [target for target in imports(name) if target.split(".")[0] in ("pickle", "marshal", "yaml", "joblib")]
    # released.py names pickle's error class; joblib knows how many cores a container has.
    assert not loaders or (name, loaders) in [
        ("simsid.models.released", ["pickle"]),
        ("simsid.parallel", ["joblib"]),
    ]
    assert "joblib" not in loaders or "from joblib import cpu_count\n" in MODULES[name].read_text("utf-8")


DRAWING = (
    "simsid.report.figures",
    "simsid.report.embedding",
    "simsid.study.figure",
    "simsid.study.reconstructions",
    "simsid.detector",
)
"""Modules that may import matplotlib and scikit-learn: they are imported when they are needed."""


def test_importing_simsid_is_light():
    """`import simsid` alone loads neither PyTorch nor any of the heavy libraries."""
    top = [node for node in TREES["simsid"].body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert {alias.name for node in top for alias in node.names} <= {
        "importlib",
        "importlib.abc",
        "importlib.machinery",
        "importlib.util",
        "pathlib",
        "sys",
    }
    for name in ("matplotlib", "sklearn", "triton"):
        for module, tree in TREES.items():
            if module.startswith("simsid.kernels") or module in DRAWING:
                continue
            heads = [ast.unparse(node) for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
            assert not [head for head in heads if head.split()[1].split(".")[0] == name], module


def test_imports_stay_light():
    """`import simsid` imports nothing heavy, and the model nothing that only reports, DICOM and kernels need."""
    script = (
        "import sys, simsid\n"
        "assert not {'torch', 'numpy'} & set(sys.modules), 'import simsid'\n"
        "import simsid.models.model, simsid.models.released\n"
        "found = {'triton', 'matplotlib', 'sklearn', 'pydicom', 'tyro', 'tensorboard'} & set(sys.modules)\n"
        "assert not found, found\n"
        "simsid.load('zhanglab')\n"
        "import torch\n"
        "with torch.device('meta'): simsid.Model(width=4)\n"  # as loading a network does
        "assert not {'torch._dynamo', 'sympy'} & set(sys.modules), 'loading takes seconds with these'\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
