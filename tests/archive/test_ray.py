"""A real Ray cluster of several nodes on this machine."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

pytestmark = [pytest.mark.workshop, pytest.mark.filterwarnings("ignore::Warning")]  # Ray's own

ray = pytest.importorskip("ray", reason="the extra ray is not installed")

NODE = {"num_cpus": 1, "object_store_memory": 100 * 1024 * 1024}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head that works on nothing, and two nodes of one core each."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 0, "include_dashboard": False})
    made.nodes_of_work = [made.add_node(**NODE), made.add_node(**NODE)]
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture
def archive(texture_set: Path, tmp_path: Path) -> Path:
    sources = sorted((texture_set / "test").rglob("*.png"))
    folder = tmp_path / "many"
    folder.mkdir()
    for index in range(4000):
        (folder / f"{index:05d}.png").symlink_to(sources[index % len(sources)])
    (folder / "bad.png").write_bytes(b"no image")
    return folder


def test_a_node_that_is_killed_costs_neither_images_nor_doubles(
    cluster: Any, archive: Path, small_bundle: Path, invoke: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def kill_a_node() -> None:
        while len(list((out / "results").glob("unit-*.parquet"))) < 2:
            time.sleep(0.05)
        cluster.remove_node(cluster.nodes_of_work[0], allow_graceful=False)
        killed_at.append(len(list((out / "results").glob("unit-*.parquet"))))

    killed_at: list[int] = []
    killer = threading.Thread(target=kill_a_node)
    killer.start()
    outcome = invoke("score", small_bundle, archive, "--out", out, "--ray", cluster.address, "--worst", 3, "--json")
    killer.join()
    assert outcome.code == 9, outcome.err
    assert outcome.json == {
        "out": str(out),
        "images": 4001,
        "anomalies": outcome.json["anomalies"],
        "errors": 1,
        "missing": 0,
    }
    assert 2 <= killed_at[0] < 16
    rows = pq.read_table(out / "results").to_pylist()
    assert sorted(row["id"] for row in rows) == sorted(path.name for path in archive.iterdir())
    assert len(list((out / "worst").iterdir())) == 3
    here = invoke("score", small_bundle, archive, "--out", tmp_path / "here", "--worst", 0, "--json")
    assert here.json["anomalies"] == outcome.json["anomalies"]


def test_an_address_without_a_cluster_is_one_clear_error(
    archive: Path, small_bundle: Path, invoke: Any, tmp_path: Path
) -> None:
    outcome = invoke("score", small_bundle, archive, "--out", tmp_path / "out", "--ray", "127.0.0.1:1")
    assert outcome.code == 2
    assert outcome.error_line.startswith("--ray 127.0.0.1:1: ")
