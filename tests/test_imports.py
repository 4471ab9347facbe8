"""The one-way rule of imports, and what ``import ssd`` registers."""

import ast
from pathlib import Path

import pytest
from commands import run

ROOT = Path(__file__).parent.parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "ssd").rglob("*.py"))
}
PACKAGES = ("ssd.modeling", "ssd.data", "ssd.checkpoint")
LEAVES = [
    "ssd.modeling.default_boxes", "ssd.modeling.multibox", "ssd.modeling.postprocessing",
    "ssd.data.batch", "ssd.data.boxes", "ssd.data.files", "ssd.data.transforms", "ssd.checks",
    "ssd.cuda_graph", "ssd.memory",
]  # fmt: skip
SHARED = ("ssd.checks", "ssd.cuda_graph", "ssd.memory")  # leaves that all parts may import
ABOVE = ("tools", "labs", "tests", "train_net")


def imports(module):
    """(name, whether at the top level) of each import; ``from a import b`` gives a.b."""
    tree = ast.parse(MODULES[module].read_text())
    result = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        result |= {(name, node in tree.body) for name in names}
    return result


def within(name, package):
    return name == package or name.startswith(package + ".")


def own(module):
    """Those of the package itself."""
    return {name for name, _ in imports(module) if within(name, "ssd")}


def test_modules_are_found():
    assert len(MODULES) > 15 and all(leaf in MODULES for leaf in LEAVES)
    assert "ssd.modeling.multibox.encode_boxes" in own("ssd.modeling.ssd")


@pytest.mark.parametrize("module", MODULES)
def test_the_package_imports_nothing_above_it(module):
    found = [name for name, _ in imports(module) for above in ABOVE if within(name, above)]
    assert not found


@pytest.mark.parametrize("package", PACKAGES)
def test_parts_import_neither_one_another_nor_the_engine(package):
    for module in MODULES:
        if within(module, package):
            allowed = (package, *SHARED, "ssd.config.read_config")
            assert all(any(within(name, x) for x in allowed) for name in own(module)), module


@pytest.mark.parametrize("module", LEAVES)
def test_leaves_import_no_other_module_but_the_checks(module):
    assert all(within(name, "ssd.checks") for name in own(module))


def test_config_imports_the_data_sets_only_when_called():
    assert own("ssd.config") == {"ssd.checks.is_ssd", "ssd.data.datasets.register_datasets"}
    top = [name for name, top in imports("ssd.config") if top and within(name, "ssd")]
    assert top == ["ssd.checks.is_ssd"]


def test_importing_the_package_registers_everything():
    code = """
import ssd
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY
from detectron2.modeling.anchor_generator import ANCHOR_GENERATOR_REGISTRY
assert META_ARCH_REGISTRY.get("SSD").__module__ == "ssd.modeling.ssd"
assert "DefaultBoxGenerator" in ANCHOR_GENERATOR_REGISTRY
for name in ("build_ssd_backbone", "build_vgg16_backbone", "build_mobilenetv2_backbone"):
    assert name in BACKBONE_REGISTRY, name
"""
    run("-c", code)
