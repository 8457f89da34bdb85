"""The committed quickstart base: it mostly guesses, has not seen the data, and loads anywhere."""

import importlib.util
import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from paths import CONFIGS

from dapo_async.data import load_prompts, load_tokenizer
from dapo_async.model import Decoder, PackedAttention, load_decoder
from dapo_async.reward import get_verifier

FOLDER, DATA = CONFIGS / "base" / "quickstart", CONFIGS / "data" / "quickstart"


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "make_quickstart", CONFIGS / "base" / "make_quickstart.py"
    )
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


make = load_script()


def rows(split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DATA / f"{split}.jsonl").read_text().splitlines()]


def committed_problems(split: str) -> list[str]:
    return [row["prompt"] for row in rows(split)]


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return load_decoder(FOLDER)


def test_corpus_training_and_heldout_problems_are_disjoint() -> None:
    heldout, train = set(committed_problems("heldout")), set(committed_problems("train"))
    corpus = set(islice(make.problems("corpus", seed=0), 100_000))
    assert len(heldout) == 1024
    assert len(train) == 4096
    assert not heldout & train
    assert not heldout & corpus
    assert not train & corpus
    # Not by luck: every problem has one set, whatever the seed and however long the pretraining.
    splits = (("heldout", heldout), ("train", train), ("corpus", corpus))
    assert all(
        make.split_of(problem) == split for split, problems in splits for problem in problems
    )


def test_committed_data_is_what_the_script_writes(tmp_path: Path) -> None:
    for split, count in (("heldout", 1024), ("train", 4096)):
        make.write_problems(split, tmp_path / "made.jsonl", count=count, seed=0)
        assert (tmp_path / "made.jsonl").read_bytes() == (DATA / f"{split}.jsonl").read_bytes()


def test_committed_folder_is_what_the_script_writes_but_for_the_weights(
    tmp_path: Path, decoder: Decoder
) -> None:
    make.write_folder(decoder, tmp_path)
    for path in sorted(tmp_path.iterdir()):
        assert path.read_bytes() == (FOLDER / path.name).read_bytes(), path.name
    assert sorted(path.name for path in FOLDER.iterdir()) == sorted(
        path.name for path in tmp_path.iterdir()
    )


def test_gold_answers_are_the_digit_sums_modulo_7() -> None:
    for row in rows("heldout")[:200] + rows("train")[:200]:
        assert int(row["answer"]) == sum(int(digit) for digit in row["prompt"]) % 7


def test_corpus_responses_end_in_the_gold_answer_in_both_styles() -> None:
    assert make.response_to("52841", step_by_step=True) == "50156####6"
    assert make.response_to("52841", step_by_step=False) == "####6"
    assert all(
        get_verifier("marker")(make.response_to("52841", step_by_step=style), "6").correct
        for style in (False, True)
    )


def test_the_folder_is_below_a_megabyte_and_the_data_below_half_of_one() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 1_000_000
    assert sum(path.stat().st_size for path in DATA.iterdir()) < 500_000


def test_transformers_loads_the_folder_and_computes_the_same_logits(decoder: Decoder) -> None:
    from transformers import AutoModelForCausalLM

    reference: Any = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    reference.eval()
    ids = torch.tensor(make.encode("31415926535=34115"))
    attention = PackedAttention([len(ids)])
    with torch.no_grad():
        logits = decoder.logits(decoder(ids, attention.positions, attention))
        torch.testing.assert_close(logits, reference(ids[None]).logits[0], rtol=1e-4, atol=1e-4)
    assert (
        reference.config.eos_token_id == decoder.config.eos_token_ids[0] == make.TOKEN_ID[make.EOS]
    )


def test_committed_tokenizer_agrees_with_the_script_and_fits_the_model(decoder: Decoder) -> None:
    tokenizer = load_tokenizer(FOLDER)
    for text in ("0123456789=", "52841=50156####6"):
        assert tokenizer([text])["input_ids"] == [make.encode(text)]
        assert tokenizer.decode(make.encode(text), skip_special_tokens=True) == text
    assert len(make.VOCABULARY) == decoder.config.vocab_size


def test_longest_problem_and_its_solution_fit_into_the_quickstart_limits(decoder: Decoder) -> None:
    loaded = load_prompts(
        DATA / "train.jsonl",
        tokenizer=load_tokenizer(FOLDER),
        prompt_key="prompt",
        answer_key="answer",
        template="{problem}=",
        max_prompt_tokens=24,
    )
    assert str(loaded.left_out) == "none"
    assert max(len(prompt.token_ids) for prompt in loaded.prompts) == make.NUM_DIGITS[1] + 1
    assert (
        make.NUM_DIGITS[1] + 3 <= 24
    )  # running sums, marker, answer, end token: as response tokens
    assert decoder.config.max_positions >= 48


def test_step_by_step_solutions_become_rare_and_rarest_for_long_sums() -> None:
    assert [make.step_share(size, progress=0.5) for size in (4, 20)] == pytest.approx([0.7, 0.7])
    assert [make.step_share(size, progress=1.0) for size in (4, 20)] == pytest.approx(
        [0.12, 0.0003]
    )
    # Half way in log-odds: ln(0.12 / 0.88) = -1.992, ln(0.0003 / 0.9997) = -8.111, mean -5.052.
    assert make.step_share(12, progress=1.0) == pytest.approx(0.00636, abs=1e-5)
    assert make.step_share(12, progress=0.7) == pytest.approx((0.7 + 0.00636) / 2, abs=1e-5)


def test_the_base_mostly_guesses_and_is_right_when_it_works_step_by_step(decoder: Decoder) -> None:
    problems = committed_problems("heldout")
    verify = get_verifier("marker")
    torch.manual_seed(0)

    def share_correct(pairs: Sequence[tuple[str, str]]) -> float:
        return sum(
            verify(response, make.answer_of(problem)).correct for problem, response in pairs
        ) / len(pairs)

    greedy = list(
        zip(problems[:512], make.respond(decoder, problems[:512], greedy=True), strict=True)
    )
    sampled = list(zip(problems, make.respond(decoder, problems, greedy=False), strict=True))
    thought = [pair for pair in sampled if make.is_step_by_step(pair[1])]
    assert share_correct(greedy) < 0.2
    assert 0.01 < len(thought) / len(sampled) < 0.05
    assert share_correct(thought) > 0.9
