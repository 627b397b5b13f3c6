"""The settings of a run: read, override, validate, write. What each means is told where it stands: `run`, `model`, `objective`.

A run is one YAML file. `load("configs/digits.yaml", ["schedule.batch_size=64"])` reads it with OmegaConf,
applies the `key.path=value` overrides, and validates the whole tree with pydantic before anything else starts:
unknown keys, wrong types and impossible combinations raise `ConfigError`, which names the key's full path
and what would be right. Batch sizes are global; intervals and progress are counted in images.
"""

from sivae.config.model import MlpModel
from sivae.config.reading import dump, dump_yaml, load, parse, parse_model
from sivae.config.run import Config
from sivae.config.section import ConfigError

__all__ = ["Config", "ConfigError", "MlpModel", "dump", "dump_yaml", "load", "parse", "parse_model"]
