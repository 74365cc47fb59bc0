"""Metrics: TensorFlow Serving's names, in a text that Prometheus' own parser reads."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest

pytest.importorskip("starlette")

from prometheus_client import parser

from obmlite.serving import Code, ModelConfig, Repository
from obmlite.serving.asgi import build_app
from obmlite.serving.metrics import Metrics

NAME = ":tensorflow:serving:"


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = parser.text_string_to_metric_families(text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_requests_and_loads(models: pathlib.Path, new_client: Any) -> None:
    metrics = Metrics()
    with Repository([ModelConfig("half", str(models / "half"))], observers=[metrics]) as own:
        own.scan()
        client = new_client(build_app(own, metrics=metrics))
        for body in ({"instances": [1.0, 2, 5]}, {"instances": [1.0]}, {"inputs": [[1.0]]}, {"instances": ["x"]}):
            client("POST", "/v1/models/half:predict", body)
        client("POST", "/v1/models/none:predict", {"instances": [1.0]})
        reply = client("GET", "/monitoring/prometheus/metrics")
    assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    found = samples(reply.text)
    assert client("GET", "/metrics").status_code == 200
    own_labels = (("model_name", "half"),)
    assert found[f"{NAME}request_count", (*own_labels, ("status", "OK"))] == 2
    assert found[f"{NAME}request_count", (*own_labels, ("status", "INVALID_ARGUMENT"))] == 2
    latency = (("API", "Predict"), ("entrypoint", "REST"), *own_labels)
    assert found[f"{NAME}request_latency_count", latency] == 2
    assert 10 < found[f"{NAME}request_latency_sum", latency] < 60e6
    assert found[f"{NAME}request_latency_bucket", (*latency[:2], ("le", "+Inf"), *own_labels)] == 2
    assert found[f"{NAME}runtime_latency_count", (("API", "Predict"), *own_labels, ("runtime", "XLA"))] == 2
    rows = (("model", "half"),)
    assert found[f"{NAME}request_example_count_total", rows] == 4
    assert found[f"{NAME}request_example_counts_sum", rows] == 4
    loads = (("model_path", "half"), ("status", "success"))
    assert found[":tensorflow:cc:saved_model:load_attempt_count", loads] == 1
    assert found[f"{NAME}model_warmup_records_read", loads[:1]] >= 1
    assert "none" not in reply.text, "names that a client sent are no labels"


def test_buckets_add_up() -> None:
    metrics = Metrics()
    for seconds in (5e-6, 10e-6, 11e-6, 1.0, 1e9):
        metrics.answered("m", "Predict", "GRPC", seconds)
    found = samples(metrics.text().decode())
    buckets = {dict(labels)["le"]: n for (name, labels), n in found.items() if name.endswith("latency_bucket")}
    assert (buckets["10"], buckets["18"], buckets["+Inf"]) == (2, 3, 5)
    counts = [count for _, count in sorted((float(le), count) for le, count in buckets.items())]
    assert counts == sorted(counts)


def test_batches() -> None:
    metrics = Metrics()
    metrics.batch("m", 1, "serving_default", 8, 3, 0.002)
    metrics.request("m", 1, "serving_default", Code.UNAVAILABLE, 0.1, None)
    found = samples(metrics.text().decode())
    assert found[f"{NAME}batching_session:queuing_latency_sum", (("model_name", "m"),)] == pytest.approx(2000)
    assert found[f"{NAME}request_count", (("model_name", "m"), ("status", "UNAVAILABLE"))] == 1
