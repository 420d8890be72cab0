"""The shape of the house, checked on every run."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import layerroute

SRC = Path(layerroute.__file__).parent
ROOT = Path(__file__).parents[1]
ROOMS = [
    "errors",
    "files",
    "config",
    "machine",
    "routing",
    "models",
    "data",
    "inference",
    "training",
    "evaluation",
    "study",
    "integrations",
    "cli",
]
LONG_FILE, LONG_FUNCTION, MANY_ARGUMENTS = 400, 60, 8


def files():
    return sorted(SRC.rglob("*.py"))


def room_of(path):
    parts = path.relative_to(SRC).parts
    return parts[0].removesuffix(".py")


def rooms_imported(path):
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("layerroute.")}


def test_every_module_is_in_a_room_of_the_list():
    assert {room_of(path) for path in files()} - {"__init__"} == set(ROOMS)


def test_imports_run_one_way():
    wrong = []
    for path in files():
        room = room_of(path)
        if room == "__init__":
            continue
        allowed = set(ROOMS[: ROOMS.index(room) + 1])
        wrong += [f"{path.relative_to(SRC)} imports {name}" for name in rooms_imported(path) - allowed]
    assert not wrong


def test_routing_knows_no_hugging_face():
    assert not [p for p in (SRC / "routing").glob("*.py") if "transformers" in p.read_text()]


def test_nothing_is_long():
    long = [f"{p.relative_to(SRC)}: {n} lines" for p in files() if (n := len(p.read_text().splitlines())) > LONG_FILE]
    for path in files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                where = f"{path.relative_to(SRC)}:{node.name}"
                if node.end_lineno - node.lineno + 1 > LONG_FUNCTION:
                    long.append(f"{where}: {node.end_lineno - node.lineno + 1} lines")
                count = len(node.args.args) + len(node.args.kwonlyargs)
                if node.name == "__init__" and count - 1 > MANY_ARGUMENTS:
                    long.append(f"{where}: {count - 1} arguments")
    assert not long


def test_public_names_are_complete_and_shadow_no_module():
    assert layerroute.__all__ == sorted(layerroute.__all__)
    for name in layerroute.__all__:
        assert getattr(layerroute, name) is not None
        assert not (SRC / f"{name}.py").exists()
        assert not (SRC / name).exists()


def test_help_does_not_import_torch():
    code = "import sys, layerroute, layerroute.cli.app; print('torch' in sys.modules, 'transformers' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]


def test_the_reference_is_current():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from reference import TARGET, document
    finally:
        sys.path.pop(0)
    assert TARGET.read_text() == document(), "run `make docs`"


def test_nothing_unsafe_is_loaded():
    for path in files():
        text = path.read_text()
        assert "pickle" not in text
        assert "trust_remote_code" not in text
        assert "torch.load(" not in text


def test_links_within_a_page_lead_somewhere():
    for page in (ROOT / "docs").rglob("*.md"):
        text = page.read_text()
        heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        anchors = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}  # as GitHub makes them
        lost = set(re.findall(r"\]\(#([^)]*)\)", text)) - anchors
        assert not lost, f"{page.name}: {lost}"
