"""The table of metrics, and that what is counted is exported once."""

import re
from pathlib import Path

import pytest

from expertmesh.actors.metrics import METRICS, Kind
from expertmesh.actors.metrics_target import metrics_target
from expertmesh.cluster.errors import UnknownNameError
from tests.recorded_metrics import Recorded

DOCS = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
UNITS = {"seconds": ("_seconds", "_seconds_total"), "bytes": ("_bytes", "_bytes_total"), "ratio": ("_ratio",)}


def test_the_docs_show_the_table() -> None:
    rows = [line for line in DOCS.read_text().splitlines() if line.startswith("| `ray_expertmesh_")]
    assert rows == [
        f"| `{m.exported}` | {m.kind} | {m.unit} | {', '.join(m.labels) or '-'} | {m.meaning} |" for m in METRICS
    ]


def test_names_follow_the_conventions() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert re.fullmatch(r"expertmesh_[a-z_]+[a-z]", metric.name)
        assert metric.name.endswith("_total") == (metric.kind is Kind.COUNTER), metric.name
        assert metric.name.endswith(UNITS.get(metric.unit, ("",))), metric.name
        assert bool(metric.boundaries) == (metric.kind is Kind.HISTOGRAM), metric.name
        assert list(metric.boundaries) == sorted(set(metric.boundaries)), metric.name
        # Ray and Prometheus have labels of these names.
        assert not {"WorkerId", "NodeAddress", "job", "instance", "le"} & set(metric.labels)


def test_a_histogram_has_three_series_and_others_one() -> None:
    by_name = {metric.name: metric.series for metric in METRICS}
    assert by_name["expertmesh_epoch"] == ("ray_expertmesh_epoch",)
    assert by_name["expertmesh_queue_seconds"] == tuple(
        f"ray_expertmesh_queue_seconds_{end}" for end in ("bucket", "sum", "count")
    )


def test_a_counter_grows_by_what_is_new() -> None:
    recorded = Recorded()
    for total in (0, 3, 3, 8):
        recorded.metrics.count("expertmesh_retries_total", total, life=1, worker="worker-0")
    assert recorded.value("retries_total", worker="worker-0") == 8
    recorded.metrics.count("expertmesh_retries_total", 5, life=1, worker="worker-0")  # overtaken on its way
    assert recorded.value("retries_total", worker="worker-0") == 8
    recorded.metrics.count("expertmesh_retries_total", 9, life=1, worker="worker-0")
    assert recorded.value("retries_total", worker="worker-0") == 9
    recorded.metrics.count("expertmesh_retries_total", 2, life=2, worker="worker-0")  # started again
    recorded.metrics.count("expertmesh_retries_total", 4, life=2, worker="worker-1")
    assert recorded.value("retries_total", worker="worker-0") == 11
    assert recorded.value("retries_total", worker="worker-1") == 4


def test_a_counter_is_shown_before_there_is_anything_to_count() -> None:
    recorded = Recorded()
    recorded.metrics.count("expertmesh_request_failovers_total", 0)
    assert recorded.value("request_failovers_total") == 0


def test_only_what_is_told_of_is_made() -> None:
    recorded = Recorded()
    recorded.metrics.set("expertmesh_epoch", 3)
    recorded.metrics.set("expertmesh_epoch", 4)
    recorded.metrics.observe("expertmesh_queue_seconds", [0.5, 0.25])
    assert recorded.made == ["expertmesh_epoch", "expertmesh_queue_seconds"]
    assert recorded.value("epoch") == 4
    assert recorded.observed["expertmesh_queue_seconds"] == [0.5, 0.25]


def test_what_the_table_does_not_have_is_refused() -> None:
    metrics = Recorded().metrics
    with pytest.raises(UnknownNameError, match="no gauge expertmesh_speed with the labels"):
        metrics.set("expertmesh_speed", 1)
    with pytest.raises(UnknownNameError, match="no counter expertmesh_epoch"):
        metrics.count("expertmesh_epoch", 1)
    with pytest.raises(UnknownNameError, match=r"no gauge expertmesh_kv_pages with the labels \['shard'\]"):
        metrics.set("expertmesh_kv_pages", 1, shard="shard-0")


def test_the_target_file_is_there_while_the_server_is(tmp_path: Path) -> None:
    left = tmp_path / "metrics-999999999.json"  # no process has this id
    left.write_text("[]")
    with metrics_target(tmp_path, "127.0.0.1:8080") as path:
        assert path.read_text() == '[{"targets": ["127.0.0.1:8080"], "labels": {"job": "expertmesh"}}]'
        assert list(tmp_path.iterdir()) == [path]
        with metrics_target(tmp_path, ""):
            assert path.exists(), "that of a living process is kept"
    assert list(tmp_path.iterdir()) == []
