"""Run as a process of its own: reads an artefact the way its users do, and writes down what it predicts.

Every consumer answers prompts with log-probabilities and continues them greedily, token by token, with its cache where it has
one. Nothing of resect that knows the model is imported here.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

Array = NDArray[Any]

LIKELIEST = 512
"""Of how many tokens llama.cpp is asked for log-probabilities: they come as text."""


@dataclass
class Answer:
    """What a consumer says to one prompt: `logprobs` [positions, tokens] of what follows positions `first`, `first + 1`, ...

    `tokens` [positions, tokens] numbers them where not the whole vocabulary was asked for.
    """

    continuation: list[int]
    logprobs: Array
    first: int = 0
    tokens: Array | None = None


@dataclass
class Question:
    """Prompts to continue by so many tokens, and texts to split."""

    prompts: Sequence[Sequence[int]]
    new_tokens: int
    texts: Sequence[str] = ()
    found: dict[str, Any] = field(default_factory=dict)
    """What a consumer says besides."""


def transformers_directory(path: Path, question: Question) -> Iterator[Answer]:
    """A directory through AutoConfig, AutoModel and AutoModelForCausalLM, with the code beside it if it names some."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    shipped = "auto_map" in json.loads((path / "config.json").read_text(encoding="utf-8"))
    options: dict[str, Any] = {"trust_remote_code": shipped, "local_files_only": True}
    config: Any = AutoConfig.from_pretrained(path, **options)
    loaded: Any = AutoModelForCausalLM.from_pretrained(path, use_safetensors=True, output_loading_info=True, **options)
    model, report = loaded[0].eval(), loaded[1]
    if wrong := [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]:
        raise ValueError(f"{len(wrong)} tensors do not fit {type(model).__name__}: {sorted(map(str, wrong))[:3]}")
    question.found["config"] = type(config).__name__
    with torch.no_grad():
        if not hasattr(
            config, "quantization_config"
        ):  # transformers finds quantised weights under the names of whole models only
            tokens = torch.tensor([question.prompts[0]])
            bare: Any = AutoModel.from_pretrained(path, use_safetensors=True, **options).eval()
            states = (one(tokens, use_cache=False).last_hidden_state for one in (bare, model.base_model))
            question.found["auto_model_difference"] = float((next(states) - next(states)).abs().max())
            del bare
        for prompt in question.prompts:

            def step(new: list[int], state: Any) -> tuple[Array, Any]:
                output = model(torch.tensor([new]), past_key_values=state, use_cache=True)
                return output.logits[0].float().numpy(), output.past_key_values

            yield _greedy(prompt, question.new_tokens, step)


def torch_program(path: Path, question: Question) -> Iterator[Answer]:
    """A `torch.export` program; it has no cache, so every token is predicted from all before it."""
    import torch

    program = torch.export.load(path).module()
    with torch.no_grad():
        for prompt in question.prompts:

            def step(new: list[int], state: Any) -> tuple[Array, Any]:
                tokens = [*(state or []), *new]
                logits = program(torch.tensor([tokens]))[0].float().numpy()
                return logits[-len(new) :], tokens

            yield _greedy(prompt, question.new_tokens, step)


def onnxruntime_graph(path: Path, question: Question) -> Iterator[Answer]:
    """`model.onnx` of a directory, with keys and values handed from step to step."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path / "model.onnx", options, providers=["CPUExecutionProvider"])
    empty = {
        given.name: np.zeros(
            [size if isinstance(size, int) else int(place == 0) for place, size in enumerate(given.shape)], "float32"
        )
        for given in session.get_inputs()[1:]
    }
    for prompt in question.prompts:

        def step(new: list[int], state: Any) -> tuple[Array, Any]:
            logits, *present = session.run(None, {"input_ids": np.array([new], "int64"), **(empty if state is None else state)})
            return logits[0], dict(zip(empty, present, strict=True))

        yield _greedy(prompt, question.new_tokens, step)


def llama_cpp_file(path: Path, question: Question) -> Iterator[Answer]:
    """A GGUF file in llama.cpp on the CPU, keys and values in float32; its tokenizer splits the texts."""
    import xllamacpp

    server = xllamacpp.Server(_llama_cpp_settings(xllamacpp, path, question))
    question.found["texts"] = [_split(server.listening_address, text) for text in question.texts]
    # Of tokens that end within a character nothing is told, so another one is drawn; what is asked is how likely all are.
    drawn = {"n_predict": 1, "n_probs": LIKELIEST, "temperature": 0.0, "grammar": "root ::= [a-zA-Z ]+"}
    for prompt in question.prompts:
        tokens, rows = list(prompt), []
        for step in range(question.new_tokens):
            said = server.handle_completions({**drawn, "prompt": tokens, "cache_prompt": bool(step)})
            rows.append(
                sorted((one["id"], one["logprob"]) for one in said["choices"][0]["logprobs"]["content"][0]["top_logprobs"])
            )
            tokens.append(max(rows[-1], key=lambda one: float(one[1]))[0])
            question.found["from_cache"] = question.found.get("from_cache", 0) + said["timings"]["cache_n"]
        found = np.array(rows, "float64")
        yield Answer(tokens[len(prompt) :], found[..., 1].copy(), len(prompt) - 1, found[..., 0].astype("int64"))


def _llama_cpp_settings(xllamacpp: Any, path: Path, question: Question) -> Any:
    """One prompt at a time, everything that is rounded on the way in float32."""
    settings = xllamacpp.CommonParams()
    settings.model.path = str(path)
    settings.n_ctx = max(map(len, question.prompts)) + question.new_tokens + 8
    settings.n_parallel = 1
    settings.warmup = settings.fit_params = settings.ui = False
    settings.n_gpu_layers = settings.cache_ram_mib = settings.port = 0
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    return settings


def _split(address: str, text: str) -> list[int]:
    """A text in llama.cpp's tokens."""
    asked = urllib.request.Request(
        f"{address}/tokenize", json.dumps({"content": text}).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(asked, timeout=60) as answer:
        tokens: list[int] = json.load(answer)["tokens"]
    return tokens


def _greedy(prompt: Sequence[int], new_tokens: int, step: Callable[[list[int], Any], tuple[Array, Any]]) -> Answer:
    """The likeliest token again and again; `step` gives logits [new, vocabulary] and what to hand it next time."""
    logits, state = step(list(prompt), None)
    rows, continuation = [logits], [int(logits[-1].argmax())]
    while len(continuation) < new_tokens:
        logits, state = step(continuation[-1:], state)
        rows.append(logits)
        continuation.append(int(logits[-1].argmax()))
    found = np.concatenate(rows).astype("float64")
    found -= found.max(-1, keepdims=True)
    return Answer(continuation, found - np.log(np.exp(found).sum(-1, keepdims=True)))


CONSUMERS: Mapping[str, Callable[[Path, Question], Iterator[Answer]]] = {
    "transformers": transformers_directory,
    "llama.cpp": llama_cpp_file,
    "onnxruntime": onnxruntime_graph,
    "torch": torch_program,
}


def main(consumer: str, path: str, given: str, wanted: str) -> None:
    """Reads the question from one safetensors file and writes the answers to another."""
    with safe_open(given, "numpy") as file:
        said = file.metadata()
        prompts = [file.get_tensor(name).tolist() for name in sorted(file.keys())]
    question = Question(prompts, int(said["new_tokens"]), json.loads(said["texts"]))
    tensors: dict[str, Array] = {}
    for number, answer in enumerate(CONSUMERS[consumer](Path(path), question)):
        tensors[f"continuation.{number}"] = np.array(answer.continuation, "int64")
        tensors[f"logprobs.{number}"] = answer.logprobs
        tensors[f"first.{number}"] = np.array([answer.first], "int64")
        if answer.tokens is not None:
            tensors[f"tokens.{number}"] = answer.tokens
    save_file(tensors, wanted, {"found": json.dumps(question.found)})


if __name__ == "__main__":
    # Folders of code that another process copied: this one has its own.
    sys.path[:] = [place for place in sys.path if not (Path(place) / "transformers_modules").is_dir()]
    main(*sys.argv[1:])
