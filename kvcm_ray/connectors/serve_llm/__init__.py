"""A request router for Ray Serve LLM: a prompt goes where most of its prefix is cached, load considered.

    LLMConfig(..., deployment_config={
        "num_replicas": 2,
        "request_router_config": router_config(
            kvcm_data_dir="/data/kvcm", instance_id="my-model", tokenizer="/models/my-model"),
    })

* `settings`: what the deployment says, and `router_config`, which checks it before anything starts
* `prompts`: the prompt of a request, cut into pieces whose hashes name all that comes before them
* `table`: which replica served which pieces last, and which block keys they have in the shared cache
* `shared`: how many of those keys the shared cache holds: the index is read in this process
* `learning`: a thread that makes block keys of prompts after they were routed
* `running`: how many requests each replica has from this router
* `choice`: the rule
* `router`: the class that Serve makes; the only module here that needs Ray
* `deployment`: arguments of an `LLMConfig` that have all of it

A decision calls nobody, and a router never breaks serving: where it knows nothing, or something goes wrong,
the lesser loaded of two random replicas is taken, as Serve does by default.
"""

from kvcm_ray.connectors.serve_llm.settings import RouterSettings, router_config

__all__ = ["RouterSettings", "router_config"]
