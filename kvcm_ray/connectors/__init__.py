"""What plugs the cache into inference engines. Each module says which engine it needs; none is imported here.

One rule holds for all: a cache never breaks serving. What cannot be found, read or written in time is
computed by the engine. How to configure each of them, and what it is worth, is in docs/engines.md.

* `keys`: block keys from an engine's block hashes, or from token ids; any engine, none needed
* `vllm`: `KVCMConnector`, for vLLM's ``kv_connector_module_path``
* `sglang`: a ``HiCacheStorage`` backend, for SGLang's dynamic storage backends
* `transformers`: saves and restores a model's cache, for scripts
* `serve_llm`: a request router for Ray Serve LLM, and the arguments of deployments that share one cache
* `py_client`: the surface of ``kvcm_py_client``, for connectors that were made for Tair KVCM
"""
