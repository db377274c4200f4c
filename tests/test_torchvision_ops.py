"""torchvision imports, whether or not its compiled operators fit the installed torch.

Each case is a fresh process: what torch has been told about operators cannot be taken back. The stand-ins are packages
named torchvision that fail, or not, for the real reason: they register with the real torch.
"""

import os
import subprocess
import sys
from pathlib import Path

REGISTERS = """
import torch

@torch.library.register_fake("torchvision::nms")
def meta_nms(dets, scores, iou_threshold):
    return dets.new_empty(0, dtype=torch.long)

@torch.library.register_fake("torchvision::qnms")
def meta_qnms(dets, scores, iou_threshold):
    return dets.new_empty(0, dtype=torch.long)
"""


def run(code: str, *, path: Path | None = None) -> subprocess.CompletedProcess:
    root = Path(__file__).parents[1]
    places = os.pathsep.join(map(str, [root, *([path] if path else [])]))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": places},
                          cwd=root, timeout=120)


def stand_in(directory: Path, **files: str) -> Path:
    package = directory / "torchvision"
    package.mkdir()
    for name, text in files.items():
        (package / f"{name}.py").write_text(text)
    return directory


def test_the_installed_torchvision_gives_models_datasets_transforms_and_utils():
    found = run("""
from krrst_dist.torchvision_ops import torchvision
import torch, torchvision.transforms.v2
x = torchvision.models.resnet18(weights=None).eval()(torch.zeros(1, 3, 64, 64))
x = torchvision.transforms.v2.functional.horizontal_flip(torch.arange(3))
print(x.tolist(), torchvision.datasets.CIFAR100.__name__, torchvision.utils.make_grid(torch.zeros(2, 3, 4, 4)).ndim)
""")
    assert found.stdout.split("\n")[0] == "[2, 1, 0] CIFAR100 3", found.stderr


def test_a_torchvision_whose_operators_are_missing_is_imported_with_them_declared(tmp_path):
    start = "from . import extension, _meta_registrations\nwhole = True"
    where = stand_in(tmp_path, __init__=start, extension="", _meta_registrations=REGISTERS)
    plain = run("import torchvision", path=where)
    assert "operator torchvision::nms does not exist" in plain.stderr
    found = run("from krrst_dist.torchvision_ops import torchvision as t; print(t.whole, t.extension.__name__)", path=where)
    assert found.stdout == "True torchvision.extension\n", found.stderr


def test_a_torchvision_that_fits_is_left_alone(tmp_path):
    where = stand_in(tmp_path, __init__="import builtins\nbuiltins.imports = getattr(builtins, 'imports', 0) + 1")
    found = run("""
from krrst_dist.torchvision_ops import torchvision
import builtins, torch
print(builtins.imports, hasattr(torch.ops.torchvision, 'nms'))
""", path=where)
    assert found.stdout == "1 False\n", found.stderr


def test_any_other_failure_of_torchvision_is_raised_as_it_is(tmp_path):
    where = stand_in(tmp_path, __init__="raise RuntimeError('compiled for another CUDA')")
    found = run("import krrst_dist.torchvision_ops", path=where)
    assert found.returncode == 1
    assert found.stderr.endswith("RuntimeError: compiled for another CUDA\n")
