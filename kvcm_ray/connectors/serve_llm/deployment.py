"""The arguments of `LLMConfig` for replicas that share one group of the cache, with our router or Serve's.

Only what such a deployment needs is set here; everything else of `LLMConfig` is the caller's. Nothing of Ray
is imported, so that it can be looked at and tested without an engine.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from kvcm_ray.connectors.serve_llm.settings import router_config
from kvcm_ray.connectors.vllm.settings import settings_of


def llm_arguments(
    model_id: str,
    model_source: str | os.PathLike[str],
    *,
    data_dir: str | os.PathLike[str],
    instance_id: str,
    group: str = "default",
    replicas: int = 2,
    router: Mapping[str, Any] | None = None,
    engine: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Arguments of `ray.serve.llm.LLMConfig`.

    Args:
        model_id: the name of the model in requests. model_source: its folder or Hugging Face name.
        data_dir: of the manager, on the node of the replicas. All of them read and write there.
        instance_id: names the blocks of this model; equal for all its replicas, and for no other model.
        router: settings of the router (see `RouterSettings`) beside those that follow from the
            arguments above; None = Serve's own router.
        engine: more ``engine_kwargs``. environment: variables of the replicas.

    Raises:
        InvalidArgument: a wrong setting of the connector or of the router.
    """
    where = {"kvcm_data_dir": str(os.path.abspath(data_dir)), "instance_id": instance_id}
    connector = where | {"instance_group": group}
    settings_of(connector)
    deployment: dict[str, Any] = {"num_replicas": replicas}
    if router is not None:
        deployment["request_router_config"] = router_config(**where, tokenizer=str(model_source), **router)
    transfer = {
        "kv_connector": "KVCMConnector", "kv_connector_module_path": "kvcm_ray.connectors.vllm",
        "kv_role": "kv_both", "kv_connector_extra_config": connector,
    }  # fmt: skip
    return {
        "model_loading_config": {"model_id": model_id, "model_source": str(model_source)},
        "deployment_config": deployment,
        "runtime_env": {"env_vars": dict(environment or {})},
        "engine_kwargs": {"kv_transfer_config": transfer, **(engine or {})},
    }


#: For vLLM's CPU build, one thread for each engine.
CPU_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
}  # fmt: skip
CPU_ENGINE = {"block_size": 32, "enforce_eager": True, "dtype": "float32", "max_model_len": 4096}
CPU_PLACEMENT = {"bundles": [{"CPU": 1}]}
