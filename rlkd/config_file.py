"""The former place of `rlkd.config.load`, which scripts name."""

from rlkd.config.load import Args, ConfigError, Loaded, help_text, load, parse_args

__all__ = ["Args", "ConfigError", "Loaded", "help_text", "load", "parse_args"]
