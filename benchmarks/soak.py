"""A thousand steps of one session on a real backbone: random routes, roll-backs, cancels and drafts; memory and drift.

Resident memory is sampled every 50 steps. At the end the session's next scores are compared with those of a fresh
recomputation of all its tokens, each under the route it ran. Ends in one JSON line.
"""

import argparse
import json
import os
import random
import sys
from pathlib import Path

import torch

from layerroute.inference import Engine, Request, Sampling, Session, Weights
from layerroute.machine import commit, describe_machine
from layerroute.models.loading import load_backbone

Gates = tuple[bool, ...]


def resident() -> float:
    """Return this process's resident memory in MiB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def recomputed(engine: Engine, tokens: list[int], gates: list[Gates], last: list[int], route: Gates) -> torch.Tensor:
    """Return the next log-probabilities from a fresh session that is told which route every token ran."""
    session = engine.session()
    at = 0
    while at < len(tokens):
        end = next((n for n in range(at, len(tokens)) if gates[n] != gates[at]), len(tokens))
        engine.generate([Request(prompt_ids=tokens[:end], max_new_tokens=0, route=gates[at], session=session)])
        at = end
    scores = scores_of(engine, session, [*tokens, *last], route)
    session.close()
    return scores


def scores_of(engine: Engine, session: Session, ids: list[int], route: Gates) -> torch.Tensor:
    """Return the log-probabilities (vocab,) after `ids`."""
    vocab = engine.weights.shape.vocab
    asked = Request(prompt_ids=ids, max_new_tokens=1, route=route, session=session, sampling=Sampling(logprobs=vocab))
    (result,) = engine.generate([asked])
    assert result.logprobs is not None
    table = torch.empty(vocab)
    for token, value in result.logprobs[0].top:
        table[token] = value
    return table


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--longest", type=int, default=400, help="tokens after which the session is rolled back")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    model = load_backbone(options.model, dtype=options.dtype).model
    engine = Engine(Weights.from_model(model))
    shape, draw = engine.weights.shape, random.Random(0)
    session, gates, readings = engine.session(), [], []
    held = cancels = backs = kept = 0
    for number in range(options.steps):
        if len(session) > options.longest or (len(session) and draw.random() < 0.2):
            session.truncate(draw.randrange(len(session)))
            backs += 1
        del gates[len(session) :]
        route = tuple(draw.random() >= 0.25 for _ in range(shape.blocks))
        new = [draw.randrange(100, shape.vocab) for _ in range(1 + draw.randrange(12))]
        request = Request(
            prompt_ids=[*session.tokens, *new], max_new_tokens=8, route=route, session=session, draft=number % 3 * 4
        )
        stream = engine.stream(request)
        for _ in stream:
            if draw.random() < 0.05:
                cancels += 1
                break
        stream.cancel()
        kept += stream.result.kept_tokens
        gates += [route] * (len(session) - len(gates))
        held = max(held, engine.memory.used)
        assert engine.memory.used == session.nbytes
        if number % 50 == 49:
            readings.append(round(resident(), 1))
            print(f"step {number + 1}: {readings[-1]} MiB, {len(session)} tokens", file=sys.stderr, flush=True)
    tokens, route = list(session.tokens), (True,) * shape.blocks
    ours = scores_of(engine, session, [*tokens, 100], route)
    drift = float((ours - recomputed(engine, tokens, gates, [100], route)).abs().max())
    session.close()
    document = {
        "model": options.model, "dtype": options.dtype, "decoder": engine.decoder, "steps": options.steps,
        "cancels": cancels, "roll_backs": backs, "drafted_tokens_kept": kept,
        "resident_mib": readings, "held_mib_at_most": round(held / 2**20, 2), "used_after_close": engine.memory.used,
        "widest_logprob_difference": drift, "commit": commit(), "machine": describe_machine(),
    }  # fmt: skip
    print(json.dumps(document))


if __name__ == "__main__":
    main()
