"""Imports torchvision, also where its compiled operators do not fit the installed torch.

torchvision from PyPI is built against CUDA torch. Beside a CPU build of torch its compiled operators do not load, and
`import torchvision` stops with "operator torchvision::nms does not exist", because its Python side describes operators
that were never defined. Nothing in this package uses those operators (box suppression, region pooling): it is enough
to declare them. So: the plain import first, and only if it fails in just that way, declare what is missing and import
again. A torchvision that fits is left alone. Knows nothing of what torchvision is used for.

    from krrst_dist.torchvision_ops import torchvision
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import torch

_MISSING_OPERATOR = re.compile(r"operator torchvision::\w+ does not exist")
_DESCRIBED_OPERATOR = re.compile(r"""register_fake\(\s*["']torchvision::(\w+)["']""")
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"  # of nms and its quantised twin

_declared: list[torch.library.Library] = []  # a declaration lasts as long as its Library


def _import_torchvision() -> ModuleType:
    """The torchvision module. Any other failure of its import is raised as it is."""
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if not _MISSING_OPERATOR.search(str(error)):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # half-imported
    _declare_operators()
    return importlib.import_module("torchvision")


def _declare_operators() -> None:
    """Declare, without an implementation, every operator that torchvision's Python side describes unasked."""
    (package,) = importlib.util.find_spec("torchvision").submodule_search_locations
    source = Path(package, "_meta_registrations.py").read_text()
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in _DESCRIBED_OPERATOR.findall(source):
        library.define(name + _SCHEMA)
    _declared.append(library)


torchvision = _import_torchvision()
