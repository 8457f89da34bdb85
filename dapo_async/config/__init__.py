"""The config: a YAML file and dotted overrides come in, a checked, frozen `Config` leaves.

schema    every knob with its type, default and one line
sources   the grammar of models and data sets: paths and names on the Hugging Face hub
text      strings as OmegaConf reads them; texts without passwords
yaml_io   reads files and overrides, resolves paths
validate  the rules between knobs
load      joins them: `load` and `to_yaml`
"""

from dapo_async.config.load import load, to_yaml
from dapo_async.config.schema import (
    Algorithm,
    Cluster,
    Config,
    Data,
    Deadlines,
    Evaluation,
    Learner,
    Model,
    Replay,
    Reward,
    Rollout,
    Tracking,
    Train,
    Weights,
    knobs,
)
from dapo_async.config.sources import Source, parse_source, parse_sources

__all__ = [
    "Algorithm",
    "Cluster",
    "Config",
    "Data",
    "Deadlines",
    "Evaluation",
    "Learner",
    "Model",
    "Replay",
    "Reward",
    "Rollout",
    "Source",
    "Tracking",
    "Train",
    "Weights",
    "knobs",
    "load",
    "parse_source",
    "parse_sources",
    "to_yaml",
]
