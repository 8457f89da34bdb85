"""The config. Input: a YAML file and overrides. Output: a checked, frozen `Config`.

schema    every knob with its type, default, bounds and one line
sources   the grammar of models and data sets: paths and names on the Hugging Face hub
text      strings as OmegaConf reads them, removal of passwords, suggestions for wrong names
replaced  knobs of earlier versions, and what replaced them
yaml_io   reads files and overrides, resolves paths
validate  bounds, and the rules between knobs
load      uses all of these: `load` and `to_yaml`
explain   every knob as text: `config --explain` and docs/configuration.md
"""

from dapo_async.config.load import load, to_yaml
from dapo_async.config.schema import (
    MAX_RESTARTS,
    STOP_S,
    AlgorithmConfig,
    BaseModelConfig,
    ClusterConfig,
    Config,
    DataConfig,
    DeadlinesConfig,
    EvaluationConfig,
    LearnerConfig,
    NetworkConfig,
    ReplayConfig,
    RewardConfig,
    RolloutConfig,
    TrackingConfig,
    TrainConfig,
    WeightsConfig,
    knobs,
)
from dapo_async.config.sources import Source, parse_contamination, parse_source
from dapo_async.config.text import redacted

__all__ = [
    "MAX_RESTARTS",
    "STOP_S",
    "AlgorithmConfig",
    "BaseModelConfig",
    "ClusterConfig",
    "Config",
    "DataConfig",
    "DeadlinesConfig",
    "EvaluationConfig",
    "LearnerConfig",
    "NetworkConfig",
    "ReplayConfig",
    "RewardConfig",
    "RolloutConfig",
    "Source",
    "TrackingConfig",
    "TrainConfig",
    "WeightsConfig",
    "knobs",
    "load",
    "parse_contamination",
    "parse_source",
    "redacted",
    "to_yaml",
]
