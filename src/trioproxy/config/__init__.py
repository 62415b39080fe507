"""The settings: read from file, environment and command line, checked completely before anything starts.

Values are first gathered from all sources by dotted key (``scheduler.concurrency``), each with its origin, the later
source winning; then the models judge them in one go, and every problem becomes one line of one `ConfigError`.

This package knows what a setting may be, not what it is used for: it opens no socket, no file but the configuration
file and the certificates and keys that are named in it, and never puts a secret into a text.
"""

from trioproxy.config.gathered import changes, with_values_of
from trioproxy.config.settings import (
    KeySettings,
    LoggingSettings,
    SchedulerSettings,
    ServerSettings,
    Settings,
    TlsSettings,
    UpstreamSettings,
    describe,
)
from trioproxy.config.sources import control_socket, load
from trioproxy.config.values import ConfigError

__all__ = [
    "ConfigError",
    "KeySettings",
    "LoggingSettings",
    "SchedulerSettings",
    "ServerSettings",
    "Settings",
    "TlsSettings",
    "UpstreamSettings",
    "changes",
    "control_socket",
    "describe",
    "load",
    "with_values_of",
]
