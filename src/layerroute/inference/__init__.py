"""The engine room: token ids in, token ids and a route out. Nothing here knows text."""

from layerroute.inference.batching import Scheduler
from layerroute.inference.cache import OverBudget
from layerroute.inference.classes import RouteClasses
from layerroute.inference.engine import Engine, Stream
from layerroute.inference.requests import Request, Result, Session
from layerroute.inference.routers import Route, Routers
from layerroute.inference.sampling import Sampling, TokenLogprobs
from layerroute.inference.weights import Weights

__all__ = [
    "Engine",
    "OverBudget",
    "Request",
    "Result",
    "Route",
    "RouteClasses",
    "Routers",
    "Sampling",
    "Scheduler",
    "Session",
    "Stream",
    "TokenLogprobs",
    "Weights",
]
