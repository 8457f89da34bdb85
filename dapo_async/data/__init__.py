"""The data room (L2): a data set and the model's tokenizer come in, an endless, resumable stream of prompts leaves.

tokenizer  of a Hugging Face folder; transformers is imported on first use only
sources    rows of JSONL, Parquet, folders and the hub; `datasets` is imported on first use only
presets    columns and templates of published data sets
screening  repeats, conflicting answers, other languages, problems of the evaluation sets: left out and counted
templates  what stands around a problem
prompts    rows of a data set → templated, tokenised prompts, and a count of what was left out
sets       a whole data set as a config and a model want it
stream     their order: seeded, shuffled anew in each epoch

Called by the replay actor (training) and the rollout actors (held-out evaluation).
"""

from dapo_async.data.presets import PRESETS, preset_of
from dapo_async.data.prompts import PromptSet, load_fingerprints, load_prompts
from dapo_async.data.screening import Screening
from dapo_async.data.sets import check_fit, is_on_hub, load_set, usable_tokenizer
from dapo_async.data.stream import PromptStream
from dapo_async.data.templates import TEMPLATES
from dapo_async.data.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "PRESETS",
    "TEMPLATES",
    "PromptSet",
    "PromptStream",
    "Screening",
    "Tokenizer",
    "check_fit",
    "is_on_hub",
    "load_fingerprints",
    "load_prompts",
    "load_set",
    "load_tokenizer",
    "preset_of",
    "usable_tokenizer",
]
