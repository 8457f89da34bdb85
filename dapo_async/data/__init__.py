"""Input: a data set and a tokenizer. Output: an endless, resumable stream of prompts.

The replay actor reads the training set. The rollout actors read the held-out set. docs/data.md is
the page for users.

tokenizer  the tokenizer of a Hugging Face folder; imports transformers only where it is needed
plain_tokenizer  a tokenizer.json that needs no transformers
sources    rows of files, folders and the hub; imports `datasets` on first use only
json_rows  rows of JSON files
tables     rows of Parquet files and of `datasets`
formats    files that are no data files, by their first bytes
places     the file and the columns of a row, for messages
cells      lookup of a nested column, and its value as text
conversation  the turns of chat messages
problems   rows become problems; bad rows are named or counted
presets    columns and templates of published data sets
screening  leaves out repeats, conflicting answers, other languages and evaluation problems
chat       the model's chat template, tried before a run starts
templates  the text around a problem
prompts    problems become prompts; what is left out is counted
responses  token ids of a response become text
sets       the data sets that a config names
stream     the order of prompts: depends on the seed, new in each epoch
"""

from dapo_async.data.presets import PRESETS, preset_of
from dapo_async.data.prompts import PromptSet, load_fingerprints, load_prompts
from dapo_async.data.responses import response_decoder
from dapo_async.data.screening import Screening
from dapo_async.data.sets import check_fit, check_template, is_on_hub, load_set
from dapo_async.data.stream import PromptStream
from dapo_async.data.templates import TEMPLATES
from dapo_async.data.tokenizer import (
    Tokenizer,
    check_tokenizer,
    load_tokenizer,
    special_token_lines,
    usable_tokenizer,
)

__all__ = [
    "PRESETS",
    "TEMPLATES",
    "PromptSet",
    "PromptStream",
    "Screening",
    "Tokenizer",
    "check_fit",
    "check_template",
    "check_tokenizer",
    "is_on_hub",
    "load_fingerprints",
    "load_prompts",
    "load_set",
    "load_tokenizer",
    "preset_of",
    "response_decoder",
    "special_token_lines",
    "usable_tokenizer",
]
