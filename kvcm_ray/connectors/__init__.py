"""What plugs the cache into inference engines. Each module says which engine it needs; none is imported here.

* `keys`: block keys from an engine's block hashes, or from token ids; any engine, none needed
* `vllm`: `KVCMConnector`, for vLLM's ``kv_connector_module_path``
* `sglang`: a ``HiCacheStorage`` backend, for SGLang's dynamic storage backends
* `transformers`: saves and restores a model's cache, for scripts
* `py_client`: the surface of ``kvcm_py_client``, for connectors that were made for Tair KVCM
"""
