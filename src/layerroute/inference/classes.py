"""Route classes: a few routes that stand for all, so that rows which decode together run the same blocks."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from layerroute.errors import LayerRouteError
from layerroute.inference.routers import Route


@dataclass(frozen=True, slots=True)
class RouteClasses:
    """A few routes that stand for all: rows of one class share every block they run."""

    routes: tuple[Route, ...]

    @classmethod
    def learn(cls, routes: Sequence[Route], k: int) -> "RouteClasses":
        """Return at most `k` classes, all-open among them, that add little running when `routes` are rounded.

        Greedy: from the unions of observed routes, merge the two classes whose merger adds the fewest block runs.
        """
        if not routes or k < 1:
            raise LayerRouteError("route classes: give at least one route and k of at least 1.")
        everything = tuple(True for _ in routes[0])
        counts = Counter(routes)
        groups = [(route, counts[route]) for route in counts if route != everything]
        while len(groups) > k - 1 and len(groups) > 1:
            pairs = [(_merge_cost(groups[i], groups[j]), i, j) for j in range(len(groups)) for i in range(j)]
            _, i, j = min(pairs)
            merged = (_union(groups[i][0], groups[j][0]), groups[i][1] + groups[j][1])
            groups = [group for n, group in enumerate(groups) if n not in (i, j)] + [merged]
        chosen = {route for route, _ in groups} if k > 1 else set()
        return cls(tuple(sorted(chosen | {everything})))

    def round(self, route: Route) -> Route:
        """Return the class with the fewest extra blocks that runs all that `route` runs; `route` itself if none."""
        above = [c for c in self.routes if all(have or not want for have, want in zip(c, route, strict=True))]
        return min(above, key=sum, default=route)


def _union(a: Route, b: Route) -> Route:
    return tuple(x or y for x, y in zip(a, b, strict=True))


def _merge_cost(a: tuple[Route, int], b: tuple[Route, int]) -> int:
    both = sum(_union(a[0], b[0]))
    return (both - sum(a[0])) * a[1] + (both - sum(b[0])) * b[1]


__all__ = ["RouteClasses"]
