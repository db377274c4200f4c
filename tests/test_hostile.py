"""Files that were made to harm: each is refused with a sentence, in no time and little memory, and nothing of it is run.

Those with code in a pickle are in test_artifacts.py and test_fid.py.
"""

from __future__ import annotations

import json
import resource
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from krrst_dist import parquet
from krrst_dist.artifacts import ArtifactError, DistilledSet
from krrst_dist.cli import main
from krrst_dist.config import ConfigError
from krrst_dist.data.errors import BadImage
from krrst_dist.data.readers import FileImages
from krrst_dist.grid_config import load_grid
from krrst_dist.on_ray.checkpoint import MANIFEST, Checkpoints
from krrst_dist.presets_and_grids import load_preset
from krrst_dist.results import ResultStore
from krrst_dist.results.schema import ResultsError


@pytest.fixture(autouse=True)
def quickly_and_in_little_memory() -> Iterator[None]:
    """Within a minute and 3 GB: more is an error where it is asked for."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before, began = resource.getrlimit(resource.RLIMIT_AS), time.monotonic()
    resource.setrlimit(resource.RLIMIT_AS, (used + 3_000_000_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("size", [20, 100_000_000_020])
def test_a_set_whose_header_claims_100_gb_is_not_read(tmp_path, size):
    path = tmp_path / "set.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", 100_000_000_000))
        file.truncate(size)  # also one that really is that long; it takes no space on the disk
    with pytest.raises(ArtifactError, match=r"set\.safetensors begins with a header of 100 GB.*do not use it"):
        DistilledSet.load(path)


def bomb(path: Path) -> None:
    """A Parquet file of some kB whose text would take 50 GB."""
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 1_000_000, pa.int32()), pa.array(["x" * 50_000]))
    pq.write_table(pa.table({"method": text}, metadata={"krrst_dist results": "1"}), path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 100_000


def test_a_table_that_would_fill_memory_is_not_decoded(tmp_path):
    bomb(tmp_path / "bomb.parquet")
    with pytest.raises(ValueError, match="larger than 2 GB in memory"):
        parquet.decode((tmp_path / "bomb.parquet").read_bytes())


def test_a_results_store_with_such_a_table_names_the_file(tmp_path):
    bomb(tmp_path / "cell-bomb.parquet")
    with pytest.raises(ResultsError, match=r"cell-bomb\.parquet.*larger than 2 GB in memory"):
        ResultStore(tmp_path).read()


def test_a_table_reads_back_as_it_was_however_many_batches_it_takes():
    table = pa.table({"step": list(range(10_000)), "name": ["a", None] * 5_000}, metadata={"key": "value"})
    assert parquet.decode(parquet.encode(table)).equals(table, check_metadata=True)
    assert parquet.decode(parquet.encode(table.slice(0, 0))).num_rows == 0


@pytest.mark.parametrize(("load", "kind"), [(load_preset, "preset"), (load_grid, "grid")])
def test_yaml_with_code_in_its_tags_is_refused_and_not_run(tmp_path, load, kind):
    (tmp_path / "mine.yaml").write_text(f"seed: !!python/object/apply:os.mknod [{tmp_path / 'hacked'}]\n")
    with pytest.raises(ConfigError, match=f"{kind} = .*mine.yaml': not YAML: could not determine a constructor"):
        load(str(tmp_path / "mine.yaml"))
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize("text", ["".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else '1'}]\n" for i in range(30)),
                                  "a: &a [*a, *a]\n"])
def test_yaml_whose_aliases_repeat_without_end_is_refused(tmp_path, text):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match="mine.yaml': has more than 100,000 values"):
        load_preset(str(tmp_path / "mine.yaml"))


def test_yaml_that_is_nested_too_deep_is_refused(tmp_path):
    (tmp_path / "mine.yaml").write_text("seed: " + 5_000 * "[" + 5_000 * "]")
    with pytest.raises(ConfigError, match="mine.yaml': not YAML: maximum recursion depth"):
        load_preset(str(tmp_path / "mine.yaml"))


def test_an_alias_that_is_used_twice_is_fine(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: cifar100-cpu\ntarget: {network: &net {name: convnet, widths: [8, 8, 8]}}\n"
                                        "distill: {pool: {network: *net}}\n")
    config = load_preset(str(tmp_path / "mine.yaml"))
    assert config.target.network.widths == config.distill.pool.network.widths == (8, 8, 8)


def test_a_checkpoint_s_manifest_leads_nowhere_else(tmp_path):
    checkpoints = Checkpoints(str(tmp_path), keep=3)
    folder = tmp_path / "step-00000004-1"
    folder.mkdir()
    facts = {"trajectory": {}, "decay_updates": 1, "cpu_capability": None, "torch": "2"}
    shard = {"shard": 0, "name": "../../secret.safetensors", "size": 1, "sha256": "0", "position": {}}
    (folder / MANIFEST).write_text(json.dumps({"format": "krrst_dist checkpoint, version 1", "step": 4, "incarnation": 1, "facts": facts,
                                               "outer": {"size": 1, "sha256": "0"}, "shards": [shard]}))
    with pytest.raises(ArtifactError, match="names files that are not a checkpoint's"):
        checkpoints.read("step-00000004-1")


def test_an_image_that_would_fill_memory_is_one_bad_image(tmp_path):
    Image.new("1", (30_000, 30_000)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 200_000
    with pytest.raises(BadImage, match="bomb.png.*DecompressionBomb"):
        FileImages(tmp_path, ["bomb.png"], None, ())[0]


def test_the_command_line_says_one_sentence(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("seed: !!python/name:os.system\n")
    with pytest.raises(SystemExit) as stopped:
        main(["distill", "--preset", str(tmp_path / "mine.yaml")])
    shown = capsys.readouterr().err
    assert stopped.value.code == 2 and "not YAML" in shown and "Traceback" not in shown
