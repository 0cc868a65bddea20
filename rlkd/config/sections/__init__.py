"""The sections of the configuration, one file per section or group of related sections."""
