"""The slow, obvious twin of the engine: no cache, everything recomputed through transformers' own blocks.

It defines what routes mean. Every token has its own gates. At a block, all tokens go through the block; those whose
gate is closed keep the residual they came with, or what the block's bypass makes of it. So a token that skipped a
block still has keys and values there, made from the residual that passed it by, and later tokens that run the block
attend to them.
"""

import math
from contextlib import contextmanager

import torch


@contextmanager
def hooked(model, after):
    """Replace each block's output by `after(block, entering, leaving)` while the context lasts."""
    handles = [
        layer.register_forward_hook(lambda _, args, out, index=index: after(index, args[0], out))
        for index, layer in enumerate(model.model.layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def passed(model, index, x):
    """Return the residual `x` as it leaves a closed block; `model.bypasses` may hold (down, up) by block."""
    if index not in getattr(model, "bypasses", ()):
        return x
    down, up = model.bypasses[index]
    return x + model.model.layers[index].input_layernorm(x) @ down.T.to(x) @ up.T.to(x)


@torch.no_grad()
def scores(model, ids, gates):
    """Return next-token log-probabilities (tokens, vocab) of `ids` whose token t follows the route `gates[t]`."""
    runs = torch.tensor(gates)  # (tokens, blocks)
    with hooked(model, lambda index, x, out: torch.where(runs[None, :, index, None], out, passed(model, index, x))):
        logits = model(torch.tensor([ids]), use_cache=False).logits[0]
    return torch.log_softmax(logits.double(), -1)


@torch.no_grad()
def decide(model, ids, earlier, weight, bias, config):
    """Return the gates of a step read from the last of `ids`, where the first tokens followed the routes `earlier`."""
    start, end = len(earlier), len(ids)
    chosen = list(range(start, end))
    if config.skip_first and 0 in chosen and end > 1:
        chosen.remove(0)
    if config.pooling == "last":
        chosen = chosen[-config.window :]
    gates = []

    def after(index, x, out):
        tokens = x[0, chosen].float()
        if config.normalise:
            tokens = tokens / torch.sqrt((tokens**2).mean(-1, keepdim=True) + 1e-6)
        logit = float(tokens.mean(0) @ weight[index] + bias[index])
        gate = index in config.always_run or 1 / (1 + math.exp(-logit)) > config.threshold
        gates.append(gate)
        now = gate or config.scope != "step"
        runs = torch.tensor([route[index] for route in earlier] + [now] * (end - start))
        return torch.where(runs[None, :, None], out, passed(model, index, x))

    with hooked(model, after):
        model(torch.tensor([ids]), use_cache=False)
    return tuple(gates)


def greedy(model, prompt, route, count, context_route=None):
    """Return `count` greedy tokens after `prompt`: whole prompt and response recomputed for each."""
    ids, gates = list(prompt), [context_route or route] * len(prompt)
    for _ in range(count):
        ids.append(int(scores(model, ids, gates)[-1].argmax()))
        gates.append(route)
    return tuple(ids[len(prompt) :])


class Twin:
    """Follows a session from outside: which token followed which route."""

    def __init__(self, model, scope="step"):
        self.model, self.ids, self.gates = model, [], []
        self.opening = int(scope == "continuation")  # response tokens that follow the context's route

    def truncate(self, length):
        del self.ids[length:], self.gates[length:]

    def expect(self, request, result):
        """Return the log-probabilities (response, vocab) the step should have had, and remember its tokens."""
        prompt = list(request.prompt_ids)
        self.truncate(result.cached_tokens)
        assert self.ids == prompt[: len(self.ids)]
        new, response = len(prompt) - len(self.ids), list(result.token_ids)
        self.ids = prompt + response[:-1]
        self.follow(new, len(response) - 1, result)
        return scores(self.model, self.ids, self.gates)[len(prompt) - 1 :]

    def follow(self, new, ran, result):
        """Remember the routes of `new` context tokens and of `ran` response tokens."""
        first = min(self.opening, ran)
        self.gates += [result.context_route] * (new + first) + [result.route] * (ran - first)
