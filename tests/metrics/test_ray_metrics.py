"""A group's metrics at the endpoint where Ray exports its own, in a cluster that is not ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvcm_ray.testing.cluster import run_python

pytestmark = pytest.mark.ray

PROGRAM = """
    import os, sys, time
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    import httpx, numpy as np, ray
    from ray import serve
    from kvcm_ray import cluster
    from kvcm_ray.client import connect
    from kvcm_ray.cluster.environment import free_ports

    http, exported = free_ports(2)
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100_000_000,
             log_to_driver=False, _metrics_export_port=exported)
    serve.start(http_options={"host": "127.0.0.1", "port": http}, logging_config={"log_level": "ERROR"})
    manager = cluster.up_inside(sys.argv[1], ["file:16MiB"], replicas=1)
    with connect(sys.argv[1]) as client:
        instance = client.register("i", "default", block_size=16, specs={"tp0": 4096})
        assert instance.put(np.arange(1, 9), np.zeros((8, 4096), np.uint8)) == 8
    until = time.monotonic() + 60
    while time.monotonic() < until:
        lines = httpx.get(f"http://127.0.0.1:{exported}/metrics", timeout=10).text.splitlines()
        values = {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in lines
                  if line.startswith("ray_kvcm_") and 'group="default"' in line}
        if values.get("ray_kvcm_group_used_bytes") == 8 * 4096:
            break
        time.sleep(1)
    page = httpx.get(f"{manager.url}/metrics", timeout=30).text
    assert "kvcm_written_bytes_total{group=\\"default\\"} 32768.0" in page, page
    print(values.get("ray_kvcm_group_used_bytes"), values.get("ray_kvcm_written_bytes_total"),
          values.get("ray_kvcm_group_quota_bytes"), len(values))
    cluster.down(sys.argv[1])
    ray.shutdown()
"""


def test_rays_export_has_the_numbers_of_groups(tmp_path: Path) -> None:
    used, written, quota, series = run_python(PROGRAM, str(tmp_path / "data"), timeout_s=180).split()[-4:]
    assert (float(used), float(written), float(quota)) == (32768, 32768, 16 << 20)
    assert int(series) > 15
