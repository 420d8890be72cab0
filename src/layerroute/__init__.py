"""LayerRoute: adaptive depth for agents. A step that does not need a block does not run it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layerroute.config import AdapterConfig, LoraConfig, RouterConfig
    from layerroute.errors import LayerRouteError
    from layerroute.inference.engine import Engine
    from layerroute.inference.loading import load_engine
    from layerroute.models.adapter import load_adapter, save_adapter
    from layerroute.models.attaching import RoutedModel, attach
    from layerroute.models.loading import Backbone, load_backbone
    from layerroute.routing.route import Route

_HOME = {  # public name -> the module it lives in, imported when the name is first asked for
    "AdapterConfig": "config",
    "Backbone": "models.loading",
    "Engine": "inference.engine",
    "LayerRouteError": "errors",
    "LoraConfig": "config",
    "Route": "routing.route",
    "RoutedModel": "models.attaching",
    "RouterConfig": "config",
    "attach": "models.attaching",
    "load_adapter": "models.adapter",
    "load_backbone": "models.loading",
    "load_engine": "inference.loading",
    "save_adapter": "models.adapter",
}

__all__ = [
    "AdapterConfig",
    "Backbone",
    "Engine",
    "LayerRouteError",
    "LoraConfig",
    "Route",
    "RoutedModel",
    "RouterConfig",
    "attach",
    "load_adapter",
    "load_backbone",
    "load_engine",
    "save_adapter",
]


def __getattr__(name: str) -> Any:
    """Import a public name the first time it is asked for, so that `layerroute --help` stays instant."""
    if name not in _HOME:
        raise AttributeError(f"module 'layerroute' has no attribute {name!r}")
    return getattr(import_module(f"layerroute.{_HOME[name]}"), name)
