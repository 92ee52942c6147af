"""The device install resolves to ready wheels on the boards' Pythons: 3.10 (JetPack 6) and 3.11 (Raspberry Pi OS)."""

import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PLATFORMS = ["manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64"]


def applies(line: str, python: str) -> bool:
    requirement = Requirement(line)
    return requirement.marker is None or requirement.marker.evaluate({"python_version": python})


def constraints_for(python: str, path: Path) -> Path:
    """pip evaluates markers for its own Python, so the lines that apply to the board's are picked here."""
    lines = (ROOT / "deploy" / "constraints.txt").read_text().splitlines()
    chosen = [line for line in lines if line and not line.startswith("#") and applies(line, python)]
    path.write_text("\n".join(line.split(";")[0] for line in chosen))
    return path


def device_requirements(python: str) -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["device"], *extras["images"]]
    return [line.split(";")[0].strip() for line in lines if applies(line, python)]


@pytest.mark.parametrize("python", ["3.10", "3.11"])
def test_the_device_install_resolves_for_aarch64(python: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-input"]
    command += ["--only-binary=:all:", "--target", str(tmp_path / "t"), "--python-version", python]
    command += ["--implementation", "cp", *(f"--platform={p}" for p in PLATFORMS)]
    command += ["-c", str(constraints_for(python, tmp_path / "c.txt")), *device_requirements(python)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    if done.returncode and ("Connection" in done.stderr or "Temporary failure" in done.stderr):
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stderr[-1500:]


def test_an_edge_install_pulls_nothing_heavy() -> None:
    names = {Requirement(line).name for line in device_requirements("3.11")}
    assert not names & {"torch", "onnx", "pydantic", "sqlalchemy", "scikit-learn", "opencv-python-headless"}
