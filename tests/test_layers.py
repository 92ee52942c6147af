"""The import rules of the architecture, read from the source: who may import whom, and where heavy libraries live."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("edgepriv", "gateway", "firmware_sim")

# Higher numbers may import lower ones. Parts of one layer never import each other.
LAYERS = [
    {"edgepriv.errors", "edgepriv.files"},
    {"edgepriv.primitives"},
    {"edgepriv.keys"},
    {"edgepriv.wire", "edgepriv.mqtt", "edgepriv.settings", "edgepriv.datasets", "edgepriv.image_quality"},
    {"edgepriv.trust_file", "edgepriv.logs", "edgepriv.notify", "edgepriv.client", "edgepriv.doctor"},
    {"edgepriv.cipher", "edgepriv.selective_encryption", "edgepriv.federated"},
    {"edgepriv.device", "edgepriv.risk", "edgepriv.synthesis"},
    {"edgepriv.cli", "edgepriv.demo", "edgepriv.__main__"},
    {"gateway", "firmware_sim"},
]
# Within one layer these may be imported by their siblings: plain services without knowledge of each other.
SERVICES = {"edgepriv.settings", "edgepriv.datasets", "edgepriv.image_quality", "edgepriv.mqtt", "edgepriv.wire"}
JOINED = {("edgepriv.cli", "edgepriv.demo"), ("edgepriv.__main__", "edgepriv.cli")}

GATEWAY_MAY = (
    "edgepriv.errors", "edgepriv.files", "edgepriv.keys", "edgepriv.wire", "edgepriv.mqtt", "edgepriv.federated",
    "edgepriv.primitives",
    "edgepriv.settings", "edgepriv.trust_file", "edgepriv.logs", "edgepriv.notify", "edgepriv.doctor", "edgepriv",
)  # fmt: skip
GATEWAY_MAY_NOT_NAME = {"hpke_wrap", "DeviceEpoch", "FrameOpener", "open_frame", "unwrap_content"}

TRAINING = ("edgepriv/demo/", "tests/benchmarks/")
HOMES = {
    "torch": (
        "edgepriv/risk/", "edgepriv/synthesis/", "edgepriv/selective_encryption/select/",
        "edgepriv/selective_encryption/attack", "edgepriv/selective_encryption/networks.py",
        "edgepriv/federated/torch_trainer.py", *TRAINING,
    ),
    "onnx": (
        "edgepriv/risk/", "edgepriv/synthesis/", "edgepriv/selective_encryption/select/",
        "edgepriv/selective_encryption/attack", "edgepriv/selective_encryption/networks.py",
        "edgepriv/selective_encryption/carrier.py", "edgepriv/federated/torch_trainer.py", *TRAINING,
    ),
    "onnxruntime": ("edgepriv/device/infer.py", "edgepriv/risk/", "edgepriv/selective_encryption/calibrate.py"),
    "paho": ("edgepriv/mqtt.py",),
    "starlette": ("gateway/pages/", "edgepriv/risk/pages.py"),
    "Crypto": ("edgepriv/primitives/",),
    "cryptography": ("edgepriv/primitives/",),
}  # fmt: skip
MAX_FILE_LINES, MAX_FUNCTION_LINES = 500, 60
EMPTY_NAMES = {"utils", "util", "common", "helpers", "helper", "misc", "manager"}


def sources(*packages: str) -> list[Path]:
    return sorted(p for package in packages for p in (ROOT / package).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> list[tuple[str, int, bool]]:
    """Imported modules with line and whether the import is for the type checker only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            typing_only.update(inner for statement in node.body for inner in ast.walk(statement))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno, node in typing_only) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                is_module = (ROOT / Path(*full.split("."))).is_dir() or (ROOT / Path(*full.split("."))).with_suffix(
                    ".py"
                ).is_file()
                found.append((full if is_module else node.module, node.lineno, node in typing_only))
    return found


def layer_of(module: str) -> tuple[int, str] | None:
    for level, names in enumerate(LAYERS):
        for name in names:
            if module == name or module.startswith(name + "."):
                return level, name
    return None


@pytest.mark.parametrize("path", sources(*PACKAGES), ids=module_of)
def test_imports_point_one_way(path: Path) -> None:
    mine = layer_of(module_of(path))
    if mine is None:
        assert module_of(path) == "edgepriv", f"{path} stands in no layer: add it to LAYERS"
        return
    for target, line, _ in imports_of(path):
        theirs = layer_of(target)
        if theirs is None or theirs[1] == mine[1]:
            continue
        sibling = theirs[0] == mine[0] and (theirs[1] in SERVICES or (mine[1], theirs[1]) in JOINED)
        assert theirs[0] < mine[0] or sibling, f"{path.name}:{line}: {mine[1]} must not import {theirs[1]}"


@pytest.mark.parametrize("library", HOMES)
def test_each_heavy_library_stays_in_its_homes(library: str) -> None:
    strays = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sources(*PACKAGES)
        for target, line, _ in imports_of(path)
        if target.split(".")[0] == library and not str(path.relative_to(ROOT)).startswith(HOMES[library])
    ]
    assert not strays, f"{library} is imported outside its homes: {', '.join(strays)}"


def test_the_gateway_has_no_code_that_opens_frames() -> None:
    for path in sources("gateway"):
        for target, line, _ in imports_of(path):
            if target.split(".")[0] == "edgepriv":
                allowed = any(target == name or target.startswith(name + ".") for name in GATEWAY_MAY[:-1])
                assert allowed or target == "edgepriv", f"{path.name}:{line}: the gateway must not import {target}"
        named = {n.id for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Name)}
        named |= {n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)}
        assert not named & GATEWAY_MAY_NOT_NAME, f"{path.name} names {named & GATEWAY_MAY_NOT_NAME}"


def test_device_stages_know_only_the_stage_before() -> None:
    order = ["capture", "infer", "release", "seal", "spool", "publish"]
    for i, stage in enumerate(order):
        allowed = {
            f"edgepriv.device.{order[i - 1]}" if i else "",
            f"edgepriv.device.{stage}",
            "edgepriv.device.resize",
            "edgepriv.device.arena",
        }
        for target, line, _ in imports_of(ROOT / "edgepriv" / "device" / f"{stage}.py"):
            if target.startswith("edgepriv.device.") and not target.startswith("edgepriv.device.config"):
                assert target in allowed, f"{stage}.py:{line} imports {target}"


def test_the_edge_runs_where_torch_and_onnx_cannot_be_imported() -> None:
    code = (
        "import sys\n"
        "class Wall:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in {'torch', 'onnx', 'pydantic', 'sqlalchemy'}: raise ImportError(name)\n"
        "sys.meta_path.insert(0, Wall())\n"
        "import edgepriv.cli, edgepriv.cli.device, edgepriv.device.loop, gateway.cli, gateway.daemon\n"
        "import firmware_sim.scenes\n"
        "edgepriv.cli.root.get_command(None, 'device')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_edgepriv_loads_nothing_heavy() -> None:
    heavy = ("torch", "onnxruntime", "numpy", "onnx")
    code = f"import sys, edgepriv, edgepriv.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", sources(*PACKAGES), ids=module_of)
def test_files_and_functions_stay_readable(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_FILE_LINES, f"{path} has over {MAX_FILE_LINES} lines: do two ideas live there?"
    assert path.stem not in EMPTY_NAMES, f"{path} has a name that says nothing"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{path.name}:{node.lineno} {node.name} has {length} lines"


def test_nothing_is_left_open_in_the_code() -> None:
    marks = ("TO" + "DO", "FIX" + "ME", "X" * 3, "HA" + "CK")
    for path in sources(*PACKAGES, "tests"):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert not any(mark in line for mark in marks), f"{path}:{number}: {line.strip()}"
