"""A distilled set in formats that other programs read, and .pt files read back: the authors' released ones, and our own.

A tensor does not say what space its images live in. Our .pt files have an `about.json` beside them that does; the authors' have
none, and are raw pixels.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from krrst_dist import networks, parquet, storage
from krrst_dist.artifacts import ArtifactError, DistilledSet, Space
from krrst_dist.config import ConfigError
from krrst_dist.data import sources
from krrst_dist.presets_and_grids import load_preset
from krrst_dist.sheets import to_pixels, to_png

ABOUT = "about.json"
RELEASED = "cifar100-released"  # what the authors published files of


def export(path: str, to: str, format: Literal["png", "parquet", "pt"] | None = None) -> None:
    """Write a distilled set for other programs.

    Args:
        path: the distilled set, a .safetensors file or URI.
        to: folder for png (one file an image, .npy arrays beside them) and pt (x_syn.pt, y_syn.pt); file for parquet.
        format: what to write; default: parquet where `to` ends so, else png. Arrays are written as they are, in the set's own space, which
            about.json names; the authors' code takes an x_syn.pt for raw pixels, so make a set for it with --distill.space raw.
    """
    writers = {"png": to_png_folder, "parquet": to_parquet, "pt": to_pt}
    distilled = DistilledSet.load(path)
    format = format or ("parquet" if to.endswith(".parquet") else "png")
    writers[format](distilled, to)
    print(f"{len(distilled.x_syn)} images written to {to}")
    if format == "pt" and distilled.space.kind != "raw":
        print(f"x_syn.pt holds (pixel - mean) / std, with the mean and std in {ABOUT}, which `krrst import` reads; the authors' code "
              f"would take it for raw pixels")
    if format == "pt" and distilled.label_kind == "none":
        print("y_syn.pt is empty: the set has no labels, without which the authors' code cannot train on it")


def import_released(x_syn: str, y_syn: str, to: str, preset: str | None = None) -> None:
    """Make a distilled set of the authors' released files, or of those that `krrst export --format pt` wrote.

    Args:
        x_syn: x_syn.pt [m, C, H, W]: raw pixels in [0, 1], or what the about.json beside it says.
        y_syn: y_syn.pt, the labels: target representations [m, k], or what about.json says.
        to: the .safetensors file to write.
        preset: the source and the recipe they belong to; default: what the about.json beside x_syn says, else cifar100-released.
    """
    if (about := _beside(x_syn)) is None:
        distilled = _of_preset(x_syn, y_syn, preset or RELEASED)
    elif preset is None:
        distilled = from_exported(x_syn, y_syn)
    else:
        raise ConfigError(f"preset = {preset!r}: {about} says already what {x_syn} is; leave --preset out, or move that file away if it "
                          f"belongs to something else")
    distilled.save(to)
    print(f"{len(distilled.x_syn)} images written to {to}")


def _of_preset(x_syn: str, y_syn: str, preset: str) -> DistilledSet:
    """The authors' files, with the source and recipe of a preset."""
    config = load_preset(preset)
    known = sources.spec(config.source.dataset)
    if known.mean is None or known.std is None:
        raise ConfigError(f"preset = {preset!r}: the channel statistics of {config.source.dataset} are not published; take another preset")
    resolution, target = config.source.resolution, config.target.network
    k = networks.build(target.name, resolution=resolution, **target.options()).feature_dim
    distilled = from_pt(x_syn, y_syn, mean=known.mean, std=known.std, recipe=config.evaluate.pretrain.recipe(), metadata={"preset": preset})
    found = distilled.x_syn.shape[2], distilled.y_syn.shape[1]
    if found != (resolution, k):
        raise ConfigError(f"preset = {preset!r}: its images have {resolution} px and its targets {k} dimensions, but {x_syn} holds "
                          f"{found[0]} px and {y_syn} {found[1]} dimensions; name the preset they belong to")
    return distilled


def to_png_folder(distilled: DistilledSet, folder: str | Path) -> None:
    """One PNG an image (clipped to 8 bit) with `x_syn.npy`, `y_syn.npy` (exact) and `about.json` beside them."""
    for i, picture in enumerate(to_pixels(distilled.x_syn, distilled.space)):
        storage.write_whole(storage.join(folder, f"{i:05d}.png"), to_png(picture))
    for name, array in (("x_syn", distilled.x_syn), ("y_syn", distilled.y_syn)):
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        storage.write_whole(storage.join(folder, f"{name}.npy"), buffer.getvalue())
    storage.write_whole(storage.join(folder, ABOUT), json.dumps(_about(distilled), indent=1).encode())


def to_parquet(distilled: DistilledSet, uri: str | Path) -> None:
    """One row an image: `image: {bytes (PNG), path}`, `x_syn` (exact, flattened), `y_syn`; the schema's metadata has the rest."""
    m = len(distilled.x_syn)
    images = [{"bytes": to_png(picture), "path": f"{i:05d}.png"} for i, picture in enumerate(to_pixels(distilled.x_syn, distilled.space))]
    table = pa.table({"image": images, "x_syn": list(distilled.x_syn.reshape(m, -1)), "y_syn": list(distilled.y_syn)})
    about = _about(distilled) | {"shape": list(distilled.x_syn.shape)}
    storage.write_whole(uri, parquet.encode(table.replace_schema_metadata({"krrst_dist": json.dumps(about)})))


def to_pt(distilled: DistilledSet, folder: str | Path) -> None:
    """`x_syn.pt` and `y_syn.pt`, exact, with `about.json` beside them.

    These are the names and the layout that the authors' code reads. It takes the images for raw pixels, which they are only if the set
    lives in the raw space.
    """
    import torch

    for name, array in (("x_syn", distilled.x_syn), ("y_syn", distilled.y_syn)):
        buffer = io.BytesIO()
        torch.save(torch.from_numpy(array), buffer)
        storage.write_whole(storage.join(folder, f"{name}.pt"), buffer.getvalue())
    storage.write_whole(storage.join(folder, ABOUT), json.dumps(_about(distilled), indent=1).encode())


def from_pt(x_path: str | Path, y_path: str | Path, *, mean: tuple[float, ...], std: tuple[float, ...],
            recipe: dict[str, Any], metadata: dict[str, Any] | None = None) -> DistilledSet:
    """Import the authors' released x_syn.pt [m, C, H, W] (raw pixels) and y_syn.pt [m, k], read weights-only.

    mean, std: the source's channel statistics, which travel with the set.

    Raises ArtifactError for files that are damaged or no such tensors, and for images that cannot be raw pixels in [0, 1].
    """
    x, y = (_load_pt(path).astype(np.float32) for path in (x_path, y_path))
    beyond = float(np.mean((x < -0.5) | (x > 1.5))) if x.size else 0.0
    if beyond > 0.1:  # the authors never clip, so a few are
        raise ArtifactError(f"{x_path} holds values from {x.min():.3g} to {x.max():.3g}, {beyond:.0%} of them below -0.5 or above 1.5: "
                            f"these are no raw pixels in [0, 1]; divide pixels of 0 to 255 by 255, take normalised ones times std plus "
                            f"mean, or put the {ABOUT} that `krrst export` wrote beside them")
    return DistilledSet(x, y, "features", recipe, Space("raw", mean, std), None, _imported(x_path, y_path) | (metadata or {}))


def from_exported(x_path: str | Path, y_path: str | Path) -> DistilledSet:
    """The set that `to_pt` wrote, by the about.json beside x_syn.pt. Raises ArtifactError when that is damaged or of other files."""
    about_path = _beside(x_path)
    x, y = _load_pt(x_path), _load_pt(y_path)
    try:
        about = json.loads(storage.read_whole(about_path))
        space, names = about["space"], about["class_names"]
        y = y.astype(np.int64 if about["label_kind"] == "class" else np.float32)
        distilled = DistilledSet(
            x.astype(np.float32), y, about["label_kind"], about["recipe"],
            Space(space["kind"], tuple(space["mean"]), tuple(space["std"])), tuple(names) if isinstance(names, list) else names,
            about["metadata"] | _imported(x_path, y_path))
        same = distilled.fingerprint == about["fingerprint"]
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        wrong = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ArtifactError(f"{about_path} is not what `krrst export --format pt` wrote beside {x_path} ({wrong}); export the set again, "
                            f"or move that file away if these are the authors' files") from None
    if not same:
        raise ArtifactError(f"{about_path} belongs to other files than {x_path} and {y_path}, or one of them was changed (its fingerprint "
                            f"{about['fingerprint']} is not theirs, {distilled.fingerprint}); export the set again, or move that file "
                            f"away if these are the authors' files")
    return distilled


def _load_pt(path: str | Path) -> np.ndarray:
    """The one tensor of a file: whole numbers as they are, others as float32."""
    import torch

    try:
        tensor = torch.load(io.BytesIO(storage.read_whole(path)), map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch raises many kinds for a foreign or hostile file
        raise ArtifactError(f"{path} is not a tensor file that can be read without running code ({type(error).__name__})") from None
    if not isinstance(tensor, torch.Tensor):
        raise ArtifactError(f"{path} holds a {type(tensor).__name__}; one tensor is expected")
    if tensor.layout is not torch.strided or tensor.is_complex() or tensor.is_quantized or tensor.is_meta:
        raise ArtifactError(f"{path} holds a tensor of {tensor.dtype} and {tensor.layout}; a dense one of real numbers is expected")
    return (tensor.detach().float() if tensor.is_floating_point() else tensor).numpy()


def _beside(x_path: str | Path) -> str | None:
    """The about.json in the folder of a file, if there is one."""
    folder, slash, _ = str(x_path).rpartition("/")
    about = f"{folder}{slash}{ABOUT}"
    return about if storage.exists(about) else None


def _imported(x_path: str | Path, y_path: str | Path) -> dict[str, Any]:
    return {"imported_from": [str(x_path), str(y_path)]}


def _about(distilled: DistilledSet) -> dict[str, Any]:
    return {"label_kind": distilled.label_kind, "recipe": distilled.recipe, "space": vars(distilled.space),
            "class_names": distilled.class_names, "metadata": distilled.metadata, "fingerprint": distilled.fingerprint}
