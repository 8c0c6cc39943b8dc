"""A model behind Ray Serve's OpenAI HTTP API, whose engine uses the connector. Ends with its stdin.

Arguments: the model's folder, the connector's settings as JSON, ports for HTTP and for Ray's metrics.
"""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import ray
    from ray import serve
    from ray.serve.llm import LLMConfig, build_openai_app

    model, settings, port, metrics_port = sys.argv[1:5]
    environment = {
        "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
    ray.init(
        num_cpus=4, include_dashboard=False, _metrics_export_port=int(metrics_port), logging_level="ERROR"
    )
    serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
    config = LLMConfig(
        model_loading_config={"model_id": "served", "model_source": model},
        deployment_config={"num_replicas": 1, "ray_actor_options": {"num_cpus": 1}},
        placement_group_config={"bundles": [{"CPU": 1}]},
        log_engine_metrics=True,
        runtime_env={"env_vars": environment},
        engine_kwargs={
            "block_size": 32, "enforce_eager": True, "dtype": "float32", "max_model_len": 4096,
            "enable_prefix_caching": False,
            "kv_transfer_config": {
                "kv_connector": "KVCMConnector", "kv_connector_module_path": "kvcm_ray.connectors.vllm",
                "kv_role": "kv_both", "kv_connector_extra_config": json.loads(settings),
            },
        },
    )  # fmt: skip
    serve.run(build_openai_app({"llm_configs": [config]}), blocking=False)
    print("ready", flush=True)
    sys.stdin.read()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
