"""Asks llama.cpp about a GGUF, in the interpreter that has llama-cpp-python: ids, logits, texts. One JSON in, one out.

Imports nothing of the project: its packages are not there. Keys and values stay float32, as in our network; llama.cpp
would round them to float16.
"""

import json
import sys

import numpy as np
from llama_cpp import GGML_TYPE_F32, Llama, llama_model_get_vocab, llama_vocab_is_eog
from llama_cpp.llama_chat_format import Jinja2ChatFormatter


def main(asked: dict) -> dict:
    model = Llama(
        asked["model"], n_ctx=asked["context_length"], logits_all=True, type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32,
        n_threads=1, n_threads_batch=1, verbose=False,
    )  # fmt: skip
    found: dict = {"ids": [], "plain_ids": [], "greedy": [], "chats": []}
    for text in asked["texts"]:
        # Llama.__call__ and ollama have both switches on: what the file says of add_bos shows.
        found["plain_ids"].append(model.tokenize(text.encode(), add_bos=False, special=False))
        found["ids"].append(model.tokenize(text.encode(), add_bos=True, special=False))
    logits = []
    for ids in asked["sequences"]:
        model.reset()
        model.eval(ids)
        logits.append(np.array(model.scores[: len(ids)]))
    if logits:
        np.save(asked["logits"], np.concatenate(logits))
    found["greedy"] = [greedy(model, ids, asked["num_tokens"]) for ids in asked["prompts"]]
    if asked["chats"]:
        form = Jinja2ChatFormatter(
            template=model.metadata["tokenizer.chat_template"],
            eos_token=model.detokenize([model.token_eos()], special=True).decode(),
            bos_token="",
        )
        for messages in asked["chats"]:
            ids = model.tokenize(form(messages=messages).prompt.encode(), add_bos=True, special=True)
            found["chats"].append([ids, greedy(model, ids, asked["num_tokens"])])
    return found


def greedy(model: Llama, ids: list, num_tokens: int) -> list:
    """What the model puts behind ids, up to a token that ends a text by the file; that one is left out."""
    new: list = []
    for token in model.generate(ids, temp=0.0, repeat_penalty=1.0):
        if llama_vocab_is_eog(llama_model_get_vocab(model.model), token):
            break
        new.append(token)
        if len(new) == num_tokens:
            break
    return new


if __name__ == "__main__":
    json.dump(main(json.load(sys.stdin)), sys.stdout)
