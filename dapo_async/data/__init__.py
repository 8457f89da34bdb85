"""The data room (L2): a JSONL file and the model's tokenizer come in, an endless, resumable stream of prompts leaves.

tokenizer  of a Hugging Face folder; transformers is imported on first use only
prompts    rows of a file → templated, tokenised prompts, and a count of what was left out
sets       a whole file as a config and a model want it
stream     their order: seeded, shuffled anew in each epoch

Called by the replay actor (training) and the rollout actors (held-out evaluation).
"""

from dapo_async.data.prompts import PromptSet, load_prompts
from dapo_async.data.sets import check_fit, load_set, usable_tokenizer
from dapo_async.data.stream import PromptStream
from dapo_async.data.tokenizer import Tokenizer, load_tokenizer

__all__ = ["PromptSet", "PromptStream", "Tokenizer", "check_fit", "load_prompts", "load_set", "load_tokenizer", "usable_tokenizer"]
