"""A manager inside a Ray cluster that runs other things: it is used from there, and leaves no trace.

In a child: its driver starts a Ray of its own, which must not be that of the other tests.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from kvcm_ray.testing.cluster import run_python

pytestmark = pytest.mark.ray

PROGRAM = """
    import json, os, pathlib, signal, sys, time
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    import httpx, ray
    from ray import serve
    from kvcm_ray import cluster
    from kvcm_ray.cluster.environment import free_ports
    from kvcm_ray.cluster.facts import DataDirLock
    from kvcm_ray.errors import InUse, KvcmError

    data_dir = sys.argv[1]
    ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=100_000_000,
             log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": free_ports(1)[0]}, logging_config={
        "log_level": "ERROR"})

    @serve.deployment
    class Hello:
        async def __call__(self, request):
            return "hello"

    serve.run(Hello.bind(), name="other", route_prefix="/hello")

    @ray.remote(num_cpus=0)
    def engine(first):
        import numpy as np
        from kvcm_ray.client import connect
        keys = np.arange(1, 9)
        blocks = np.random.default_rng(7).integers(0, 255, (8, 4096), dtype=np.uint8)
        with connect() as client:
            instance = client.register("i", "default", block_size=16, specs={"tp0": 4096})
            if first:
                assert instance.put(keys, blocks) == 8
            back = np.zeros_like(blocks)
            found = int(instance.get(keys, back))
        return found, bool((back == blocks).all())

    def refused(*arguments, **options):
        try:
            cluster.up_inside(*arguments, **options)
        except KvcmError as error:
            return type(error).__name__
        return ""

    lock = DataDirLock(pathlib.Path(data_dir))
    out = {"did_not_start": [
        refused(data_dir), refused(data_dir + "3", ["file:16MiB:/proc/none"]),
        refused(data_dir + "3", route_prefix="/hello"),
    ], "serve_only": [a["namespace"] for a in ray.util.list_named_actors(all_namespaces=True)]}
    lock.release()
    manager = cluster.up_inside(data_dir, ["shm:16MiB"], replicas=1)
    out |= {"url": manager.url, "wrote": ray.get(engine.remote(True))}
    out["same"] = cluster.up_inside(data_dir).pid == manager.pid
    out["refused"] = [refused(data_dir + "2"), refused(data_dir, route_prefix="kvcm")]
    os.kill(manager.pid, signal.SIGKILL)
    while (again := cluster.up_inside(data_dir)).pid == manager.pid:
        time.sleep(0.1)
    out["alive"] = cluster.find(data_dir) is not None
    out["groups"] = httpx.post(manager.url + "/api/listInstanceGroup", json={"trace_id": "t"}).json()
    out["read"] = ray.get(engine.remote(False))
    out["hello"] = httpx.get(manager.url.removesuffix("/kvcm") + "/hello").text
    out["down"] = [cluster.down(data_dir), cluster.down(data_dir)]
    actors = ray.util.list_named_actors(all_namespaces=True)
    out["left"] = [actor["name"] for actor in actors if actor["namespace"] == "kvcm"]
    out["applications"] = sorted(serve.status().applications)
    cluster.up_inside(data_dir, replicas=1)
    out["after"] = ray.get(engine.remote(False))
    cluster.down(data_dir, purge=True)
    out["purged"] = not os.path.exists(data_dir)
    serve.shutdown()
    ray.shutdown()
    print(json.dumps(out))
"""


def test_a_manager_lives_inside_a_ray_cluster(tmp_path: Path) -> None:
    import json

    said = run_python(PROGRAM, str(tmp_path / "data"), timeout_s=200)
    out = json.loads(said.splitlines()[-1])
    assert out["did_not_start"] == ["InUse", "StorageIOError", "Unavailable"]
    assert set(out["serve_only"]) == {"serve"}
    assert out["url"].endswith("/kvcm")
    assert out["wrote"] == [8, True]
    assert out["same"] is True
    assert out["refused"] == ["InUse", "InvalidArgument"]
    assert out["alive"] is True
    assert [group["name"] for group in out["groups"]["instance_group"]] == ["default"]
    assert out["read"] == [8, True]
    assert out["hello"] == "hello"
    assert out["down"] == [True, False]
    assert out["left"] == []
    assert out["applications"] == ["other"]
    assert out["after"] == [8, True], "blocks stay when the manager goes"
    assert out["purged"] is True
