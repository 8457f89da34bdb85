"""Makes the quickstart's base model, which mostly guesses, and data that it has not seen.

The task: the sum of a row of 4 to 20 digits, modulo 7. The script writes `base/quickstart/`, a
plain Hugging Face folder, and `data/quickstart/*.jsonl`. The corpus has answers in two styles:

    guess         52841=####6          one digit at once, right about one time in seven
    step by step  52841=50156####6     the running sums modulo 7 first, right nearly always

Step-by-step solutions are common at first, so the model learns them well. At the end they are rare,
most of all for long sums, so the model mostly guesses. A hash of its text puts each problem into
the corpus, the training set or the held-out set, so the three do not overlap.

    python configs/base/make_quickstart.py [--steps 4000] [--seed 0] [--out configs]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dapo_async.model import Decoder, ModelConfig, PackedAttention, save_weights, token_logprobs

CONFIGS = Path(__file__).resolve().parent.parent
MODULUS = 7
NUM_DIGITS = (4, 20)  # of a problem, both included
MARKER, EOS = "####", "<eos>"
VOCABULARY = (*"0123456789", "=", MARKER, EOS)
TOKEN_ID = {token: number for number, token in enumerate(VOCABULARY)}
FIRST_STEP_SHARE = 0.7  # of step-by-step solutions in the corpus, at its start
# The same at its end, for the shortest and the longest problems; linear in log-odds in between.
LAST_STEP_SHARES = (0.12, 0.0003)
SHARE_FALLS = (0.6, 0.8)  # the share falls between these fractions of the pretraining
BATCH = 128
MAX_RESPONSE_TOKENS = NUM_DIGITS[1] + 3


def split_of(problem: str) -> str:
    """The set of a problem: a tenth is held out, four tenths are training, half is the corpus."""
    tenth = hashlib.sha256(problem.encode()).digest()[0] * 10 // 256
    return "heldout" if tenth == 0 else "train" if tenth < 5 else "corpus"


def problems(split: str, *, seed: int) -> Iterator[str]:
    """Random problems of one set, without end and with repetitions."""
    rng = np.random.default_rng((seed, ("heldout", "train", "corpus").index(split)))
    while True:
        for size in rng.integers(NUM_DIGITS[0], NUM_DIGITS[1] + 1, 64).tolist():
            problem = "".join(map(str, rng.integers(0, 10, size).tolist()))
            if split_of(problem) == split:
                yield problem


def running_sums(problem: str) -> list[int]:
    return [int(each) for each in np.cumsum([int(digit) for digit in problem]) % MODULUS]


def answer_of(problem: str) -> str:
    return str(running_sums(problem)[-1])


def prompt_of(problem: str) -> str:
    """As the model reads it: `data.template` of the quickstart's config."""
    return f"{problem}="


def response_to(problem: str, *, step_by_step: bool) -> str:
    """A corpus response, without the end token."""
    thought = "".join(map(str, running_sums(problem))) if step_by_step else ""
    return f"{thought}{MARKER}{answer_of(problem)}"


def step_share(num_digits: int, *, progress: float) -> float:
    """The probability of a step-by-step solution, at `progress` in [0, 1] of the pretraining."""
    shortest, longest = (np.log(share / (1 - share)) for share in LAST_STEP_SHARES)
    last = 1 / (1 + np.exp(-np.interp(num_digits, NUM_DIGITS, (shortest, longest))))
    return float(np.interp(progress, SHARE_FALLS, (FIRST_STEP_SHARE, last)))


def encode(text: str) -> list[int]:
    """Token ids of a text in this task's alphabet; the committed tokenizer does the same."""
    return [TOKEN_ID[MARKER if char == "#" else char] for char in text.replace(MARKER, "#")]


def base_config() -> dict[str, object]:
    """The `config.json`: Qwen3's architecture in miniature."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": len(VOCABULARY),
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "eos_token_id": TOKEN_ID[EOS],
        "initializer_range": 0.02,
        "dtype": "float32",
    }


def new_decoder() -> Decoder:
    """Matrices from N(0, 0.05²).

    Those that write to the residual stream are divided by the square root of their number, as in
    GPT-2.
    """
    decoder = Decoder(ModelConfig.from_dict(base_config()))
    writers = [
        name
        for name, _ in decoder.named_parameters()
        if name.endswith(("o_proj.weight", "down_proj.weight"))
    ]
    for name, parameter in decoder.named_parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(
                parameter, std=0.05 / (len(writers) ** 0.5 if name in writers else 1.0)
            )
    return decoder


def packed_batch(pairs: Sequence[tuple[str, str]]) -> tuple[Tensor, Tensor, PackedAttention]:
    """Of (problem, response) pairs: token ids `[T]`, the response mask `[T]`, and the attention."""
    rows = sorted(
        (
            (encode(prompt_of(problem)), [*encode(response), TOKEN_ID[EOS]])
            for problem, response in pairs
        ),
        key=lambda row: len(row[0] + row[1]),
    )
    ids = torch.tensor([token for prompt, response in rows for token in prompt + response])
    trained = torch.tensor(
        [
            flag
            for prompt, response in rows
            for flag in [False] * len(prompt) + [True] * len(response)
        ]
    )
    return ids, trained, PackedAttention([len(prompt) + len(response) for prompt, response in rows])


def pretrain(decoder: Decoder, *, steps: int, seed: int) -> Iterator[tuple[int, float]]:
    """Next-token training on the responses, with one cycle of the learning rate.

    Yields (step, loss in nats per token).
    """
    rng, stream = np.random.default_rng(seed), problems("corpus", seed=seed)
    optimizer = torch.optim.AdamW(decoder.parameters(), weight_decay=0.01, foreach=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=4e-3, total_steps=steps + 1, pct_start=0.1
    )
    for step in range(steps):
        chosen = [
            (problem, rng.random() < step_share(len(problem), progress=step / steps))
            for problem in islice(stream, BATCH)
        ]
        pairs = [
            (problem, response_to(problem, step_by_step=bool(step_by_step)))
            for problem, step_by_step in chosen
        ]
        ids, trained, attention = packed_batch(pairs)
        hidden = decoder(ids, attention.positions, attention)
        targets = trained.nonzero()[:, 0]
        logprobs, _ = token_logprobs(
            hidden[targets - 1],
            decoder.head_weight,
            ids[targets],
            torch.ones(len(targets)),
            chunk_tokens=len(targets),
        )
        loss = -logprobs.mean()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield step, float(loss.detach())


@torch.no_grad()
def respond(decoder: Decoder, texts: Sequence[str], *, greedy: bool) -> list[str]:
    """Responses to problems at temperature 0 or 1, with a full forward pass for each token.

    The end token is left out; a response without one ends in `…`.
    """
    responses: dict[str, str] = {}
    for size in sorted({len(text) for text in texts}):
        unfinished = [text for text in texts if len(text) == size]
        ids = torch.tensor([encode(prompt_of(text)) for text in unfinished])
        for _ in range(MAX_RESPONSE_TOKENS):
            if not unfinished:
                break
            drawn = _next_tokens(decoder, ids, greedy=greedy)
            goes_on = drawn != TOKEN_ID[EOS]
            rows = zip(unfinished, ids.tolist(), goes_on.tolist(), strict=True)
            responses |= {text: _decode(row[size + 1 :]) for text, row, more in rows if not more}
            unfinished = [
                text for text, more in zip(unfinished, goes_on.tolist(), strict=True) if more
            ]
            ids = torch.cat([ids, drawn[:, None]], dim=1)[goes_on]
        for text, row in zip(unfinished, ids.tolist(), strict=True):
            responses[text] = _decode(row[size + 1 :]) + "…"
    return [responses[text] for text in texts]


def _next_tokens(decoder: Decoder, ids: Tensor, *, greedy: bool) -> Tensor:
    """The next token of each row of `ids`; all rows have one length."""
    attention = PackedAttention([ids.shape[1]] * len(ids))
    hidden = decoder(ids.flatten(), attention.positions, attention).view(*ids.shape, -1)
    logits = decoder.logits(hidden[:, -1])
    return logits.argmax(-1) if greedy else torch.multinomial(logits.softmax(-1), 1)[:, 0]


def _decode(tokens: Sequence[int]) -> str:
    return "".join(VOCABULARY[token] for token in tokens)


def is_correct(problem: str, response: str) -> bool:
    return response.rpartition(MARKER)[2] == answer_of(problem) and MARKER in response


def is_step_by_step(response: str) -> bool:
    return not response.startswith(MARKER)


def style_report(decoder: Decoder, texts: Sequence[str]) -> str:
    """Greedy and sampled accuracy, and the share and accuracy of each style at temperature 1."""
    sampled = list(zip(texts, respond(decoder, texts, greedy=False), strict=True))
    thought = [pair for pair in sampled if is_step_by_step(pair[1])]
    guessed = [pair for pair in sampled if not is_step_by_step(pair[1])]
    greedy = zip(texts, respond(decoder, texts, greedy=True), strict=True)

    def accuracy(pairs: Sequence[tuple[str, str]]) -> float:
        return sum(is_correct(*pair) for pair in pairs) / max(1, len(pairs))

    return (
        f"greedy accuracy {accuracy(list(greedy)):.3f}, sampled {accuracy(sampled):.3f}; "
        f"step by step {len(thought) / len(sampled):.3f} of the responses "
        f"at accuracy {accuracy(thought):.3f}, guesses at {accuracy(guessed):.3f}"
    )


def write_tokenizer(folder: Path) -> None:
    """One token per character and one for the marker.

    The marker is no special token, because a verifier must see it in the decoded text.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(dict(TOKEN_ID), unk_token=EOS))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_tokens([AddedToken(MARKER, special=False, normalized=False)])
    tokenizer.add_special_tokens([AddedToken(EOS, special=True, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": EOS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": base_config()["max_position_embeddings"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_folder(decoder: Decoder, folder: Path) -> None:
    """The plain Hugging Face folder: config, generation config, tokenizer, weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(base_config(), indent=2) + "\n")
    generation = {"eos_token_id": TOKEN_ID[EOS], "do_sample": True, "temperature": 1.0}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    write_tokenizer(folder)
    save_weights(decoder.state_dict(), folder)


def write_problems(split: str, path: Path, *, count: int, seed: int) -> list[str]:
    """Writes the first `count` distinct problems of a set as JSONL rows; returns the problems."""
    distinct: dict[str, None] = {}
    for problem in problems(split, seed=seed):
        distinct[problem] = None
        if len(distinct) == count:
            break
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(
            json.dumps({"prompt": problem, "answer": answer_of(problem)}) + "\n"
            for problem in distinct
        )
    )
    return list(distinct)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=int, default=4000, help="pretraining steps; one core does about 15 a second"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out",
        type=Path,
        default=CONFIGS,
        help="where base/quickstart and data/quickstart are written",
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    data = options.out / "data" / "quickstart"
    heldout = write_problems("heldout", data / "heldout.jsonl", count=1024, seed=options.seed)
    write_problems("train", data / "train.jsonl", count=4096, seed=options.seed)
    decoder, started = new_decoder(), time.monotonic()
    print(f"{sum(parameter.numel() for parameter in decoder.parameters())} parameters")
    for step, loss in pretrain(decoder, steps=options.steps, seed=options.seed):
        if step % 500 == 499 or step == options.steps - 1:
            elapsed = time.monotonic() - started
            report = style_report(decoder, heldout[:512])
            print(f"step {step + 1} loss {loss:.3f} after {elapsed:.0f} s; {report}", flush=True)
    write_folder(decoder, options.out / "base" / "quickstart")


if __name__ == "__main__":
    main()
