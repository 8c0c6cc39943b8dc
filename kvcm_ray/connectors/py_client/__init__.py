"""The surface of ``kvcm_py_client``, the transfer client of Tair KVCM, over our storages.

Connectors that were made for it run unchanged against a kvcm-ray manager: they import
``kv_cache_manager.client.pybind.kvcm_py_client``, which is a compiled module there. Make ours answer to that
name in one of two ways:

* in this process only, before the connector is imported::

      from kvcm_ray.connectors import py_client
      py_client.install()

* in every process of a Python environment, also in those that an engine spawns::

      python -m kvcm_ray.connectors.py_client install

  which writes one small module to where the compiled one would be (``uninstall`` removes it).

What it does more than the contract asks: a block of a kvcm-ray storage is read with its header, and a
block that is not proved to be the one that the location names is an error, never wrong bytes. A writer
whose session is over is refused. One call may name blocks of several storages. What it does not do: GPU
memory (buffers must be host memory), mooncake and pace storages.
"""

from kvcm_ray.connectors.py_client.installing import install, install_files, uninstall_files

__all__ = ["install", "install_files", "uninstall_files"]
