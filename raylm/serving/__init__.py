"""The Serve application: vLLM's engine and OpenAI routes in one replica, behind HAProxy or Serve's Python proxy.

`serve` is what `raylm.serve` calls; `build_app` and `ServeArgs` are for `serve run`, `serve deploy` and Serve YAML.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raylm.config.serving import ServeArgs as ServeArgs
    from raylm.serving.app import build_app as build_app
    from raylm.serving.chat_page import build_page_app as build_page_app
    from raylm.serving.deploy import Deployment as Deployment
    from raylm.serving.deploy import delete as delete
    from raylm.serving.deploy import deploy_app as deploy_app
    from raylm.serving.deploy import deployed as deployed
    from raylm.serving.deploy import roll_back as roll_back
    from raylm.serving.endpoint import Endpoint as Endpoint
    from raylm.serving.endpoint import serve as serve

_HOMES = {
    "Deployment": "raylm.serving.deploy",
    "Endpoint": "raylm.serving.endpoint",
    "ServeArgs": "raylm.config.serving",
    "build_app": "raylm.serving.app",
    "build_page_app": "raylm.serving.chat_page",
    "delete": "raylm.serving.deploy",
    "deploy_app": "raylm.serving.deploy",
    "deployed": "raylm.serving.deploy",
    "roll_back": "raylm.serving.deploy",
    "serve": "raylm.serving.endpoint",
}

__all__ = [
    "Deployment",
    "Endpoint",
    "ServeArgs",
    "build_app",
    "build_page_app",
    "delete",
    "deploy_app",
    "deployed",
    "roll_back",
    "serve",
]


def __getattr__(name: str) -> Any:
    """Imports a public name on first use, so that importing the package costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
