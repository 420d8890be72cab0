"""Requests that show the whole distribution, and the check against the twin."""

import torch
from tiny import SIZES

from layerroute.inference import Request, Sampling

VOCAB, BLOCKS = SIZES["vocab_size"], SIZES["num_hidden_layers"]


def prompt_of(count, seed=0):
    return torch.randint(3, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def ask(prompt, new=6, **rest):
    """A greedy request that reports the whole distribution of every token."""
    return Request(prompt_ids=prompt, max_new_tokens=new, sampling=Sampling(logprobs=VOCAB), **rest)


def asked(rows):
    """Requests of (route, prompt length, new tokens, whether drawn hot), reporting the whole distribution."""
    return [
        Request(
            prompt_ids=prompt_of(length, number),
            max_new_tokens=new,
            route=route,
            sampling=Sampling(temperature=0.9 * hot, seed=number, logprobs=VOCAB),
        )
        for number, (route, length, new, hot) in enumerate(rows)
    ]


def distributions(result):
    """The log-probabilities (tokens, vocab) that the engine reports."""
    table = torch.empty(len(result.token_ids), VOCAB, dtype=torch.float64)
    for row, entry in zip(table, result.logprobs, strict=True):
        for token, value in entry.top:
            row[token] = value
    return table


def same(result, expected, tolerance=2e-4):
    torch.testing.assert_close(distributions(result), expected, rtol=0, atol=tolerance)


def openings(engine, prompts):
    """Return what entered the blocks when first tokens of answers ran, (blocks, rows, hidden), and the answers."""
    gates, found = engine.scheduler.gates, []
    decide = gates.of_tokens
    gates.of_tokens = lambda entered: found.append(entered.clone()) or decide(entered)
    results = engine.generate([Request(prompt_ids=prompt, max_new_tokens=3) for prompt in prompts])
    gates.of_tokens = decide
    return torch.cat(found, dim=1), [result.token_ids for result in results]
