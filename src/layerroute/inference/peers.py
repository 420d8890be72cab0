"""Other engines, timed the same way on the same contexts. Each is optional, and says why where it can't run."""

import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

Contexts = Sequence[Sequence[int]]
Generate = Callable[[Contexts, int], object]
"""Greedily generates so many tokens after each of several contexts of one length."""


class Missing(Exception):
    """A peer that can't be timed; the message says why."""


def time_peer(generate: Generate, contexts: Contexts, new_tokens: int) -> tuple[float, float]:
    """Return the seconds of one token of each row (the prefill), and those of `new_tokens - 1` more."""
    took = []
    for count in (1, new_tokens):
        began = time.perf_counter()
        generate(contexts, count)
        took.append(time.perf_counter() - began)
    return took[0], max(took[1] - took[0], 1e-9)


def transformers(model: Any) -> Generate:
    """Return `generate` of transformers on `model`, a Hugging Face causal LM, with no work beside greedy decoding.

    A stop token that must not come, or a penalty that a checkpoint's own settings name, goes over all scores of each
    token, which the engine isn't asked for.
    """
    from transformers import GenerationConfig

    plain = GenerationConfig(do_sample=False, pad_token_id=0)

    @torch.inference_mode()
    def generate(contexts: Contexts, count: int) -> object:
        inputs = torch.tensor([list(context) for context in contexts], device=model.device)
        mask = torch.ones_like(inputs)
        own, model.generation_config = model.generation_config, plain
        try:
            tokens = model.generate(inputs, attention_mask=mask, max_new_tokens=count)
        finally:
            model.generation_config = own
        return tokens.tolist()  # a GPU is waited for

    return generate


def llama_cpp(gguf: Path | None) -> Generate:
    """Return llama.cpp on a GGUF file, one row at a time.

    Raises:
        Missing: llama-cpp-python is not installed, or no file is given.
    """
    module = _needed("llama_cpp", gguf, "--gguf FILE")
    model = module.Llama(model_path=str(gguf), n_ctx=4096, n_threads=torch.get_num_threads(), verbose=False)

    def generate(contexts: Contexts, count: int) -> object:
        if len(contexts) > 1:
            raise Missing("one row only")
        tokens = model.generate(list(contexts[0]), temp=0.0, top_k=1, reset=True)
        model.reset()
        return [next(tokens) for _ in range(count)]

    return generate


def onnxruntime_genai(folder: Path | None) -> Generate:
    """Return ONNX Runtime GenAI on a model folder of its own builder.

    Raises:
        Missing: onnxruntime-genai is not installed, or no folder is given.
    """
    module = _needed("onnxruntime_genai", folder, "--onnx FOLDER")
    model = module.Model(str(folder))

    def generate(contexts: Contexts, count: int) -> object:
        options = module.GeneratorParams(model)
        length = len(contexts[0]) + count
        options.set_search_options(
            max_length=length,
            min_length=length,
            batch_size=len(contexts),
            do_sample=False,
            past_present_share_buffer=True,
        )
        generator = module.Generator(model, options)
        generator.append_tokens(torch.tensor([list(context) for context in contexts], dtype=torch.int32).numpy())
        for _ in range(count):
            generator.generate_next_token()
        return generator

    return generate


def vllm(folder: Path | None, dtype: torch.dtype) -> Generate:
    """Return vLLM on a Hugging Face model folder, held in `dtype`.

    Raises:
        Missing: vllm is not installed, or no folder is given.
    """
    module = _needed("vllm", folder, "--folder FOLDER")
    engine = module.LLM(
        str(folder),
        dtype=str(dtype).removeprefix("torch."),
        max_model_len=4096,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=2 << 30,  # else it wants nearly all memory, and other engines are in it
    )

    def generate(contexts: Contexts, count: int) -> object:
        sampling = module.SamplingParams(temperature=0.0, max_tokens=count, min_tokens=count, ignore_eos=True)
        prompts = [{"prompt_token_ids": list(context)} for context in contexts]
        return engine.generate(prompts, sampling, use_tqdm=False)

    return generate


def available(model: Any, gguf: Path | None, onnx: Path | None, folder: Path | None) -> dict[str, Generate | str]:
    """Return every peer by name: how to generate with it, or why it is not here."""
    openers: dict[str, Callable[[], Generate]] = {
        "transformers": lambda: transformers(model),
        "llama.cpp": lambda: _on_processor(model, llama_cpp, gguf),
        "onnxruntime-genai": lambda: _on_processor(model, onnxruntime_genai, onnx),
        "vllm": lambda: vllm(folder, model.dtype),
    }
    found: dict[str, Generate | str] = {}
    for name, opened in openers.items():
        try:
            found[name] = opened()
        except Missing as reason:
            found[name] = str(reason)
    return found


def _on_processor(model: Any, peer: Callable[[Path | None], Generate], files: Path | None) -> Generate:
    if model.device.type != "cpu":
        raise Missing("timed on processors only: hide the GPU with CUDA_VISIBLE_DEVICES=")
    return peer(files)


def _needed(module: str, file: Path | None, flag: str) -> Any:
    if find_spec(module) is None:
        raise Missing("not installed")
    if file is None:
        raise Missing(f"installed; give {flag}")
    return __import__(module)
