"""Engines behind one OpenAI API that share one cache, and a router that knows what is in it. See README.md.

    serve run examples.serve_llm.app:build data_dir=/tmp/kvcm-example       # or
    python examples/serve_llm/app.py --data-dir /tmp/kvcm-example

A manager must run on the data directory, in this Ray cluster or elsewhere on this node. The model is
SmolLM2-135M-Instruct on the CPU, from a package on PyPI, unless `model` names a folder.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ray import serve
from ray.serve.llm import LLMConfig, build_openai_app

from kvcm_ray.connectors.serve_llm.deployment import (
    CPU_ENGINE,
    CPU_ENVIRONMENT,
    CPU_PLACEMENT,
    llm_arguments,
)
from kvcm_ray.testing import smollm2


def build(arguments: dict[str, str]) -> serve.Application:
    """The application. Arguments: data_dir; model, replicas, router ("kvcm" or "default") if wanted."""
    source = arguments.get("model") or str(smollm2.folder())
    found = llm_arguments(
        "example", source, data_dir=arguments["data_dir"], instance_id=f"example-{Path(source).name}",
        replicas=int(arguments.get("replicas", 2)),
        router={} if arguments.get("router", "kvcm") == "kvcm" else None,
        engine=CPU_ENGINE, environment=CPU_ENVIRONMENT,
    )  # fmt: skip
    config = LLMConfig(**found, placement_group_config=CPU_PLACEMENT, log_engine_metrics=True)
    return build_openai_app({"llm_configs": [config]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--model", default="", help="folder of a model; default: SmolLM2-135M-Instruct")
    parser.add_argument("--replicas", default="2")
    parser.add_argument("--router", default="kvcm", choices=["kvcm", "default"])
    given = parser.parse_args()
    arguments = {
        "data_dir": given.data_dir, "model": given.model, "replicas": given.replicas,
        "router": given.router,
    }  # fmt: skip
    serve.run(build(arguments), name="llm", route_prefix="/", blocking=True)


if __name__ == "__main__":
    sys.exit(main())
