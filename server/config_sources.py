"""Where settings come from: flags, environment variables, TGI's variables; and whether they fit together."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from server.config import ServerConfig
from server.setting_values import switch
from server.tgi_environment import explain_tgi, tgi_settings

ENVIRONMENT_PREFIX = "INFLIGHTD_"


class ConfigError(Exception):
    """A setting is wrong; the message says which one and what it takes."""


def _settings() -> list[dataclasses.Field[Any]]:
    return list(dataclasses.fields(ServerConfig))


def environment_variable(name: str) -> str:
    """The variable of a setting."""
    return ENVIRONMENT_PREFIX + name.upper()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds MODEL and one flag for each setting; values stay text until ``config_from``."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for setting in _settings():
        meta = setting.metadata
        group = groups.setdefault(meta["group"], parser.add_argument_group(meta["group"]))
        if setting.name == "model":
            group.add_argument("model", nargs="?", metavar="MODEL", help=meta["help"])
            continue
        shown = meta["help"]
        if setting.default is not None and "default" not in shown:
            shown += f" (default: {setting.default})"
        bare: dict[str, Any] = {"nargs": "?", "const": "on"} if meta["parse"] is switch else {}
        group.add_argument(
            "--" + setting.name.replace("_", "-"),
            metavar=meta["metavar"] or setting.name.upper(),
            **bare,
            help=shown.replace("%", "%%"),
        )


def _own_settings(
    arguments: argparse.Namespace, environment: Mapping[str, str]
) -> dict[str, tuple[str, str]]:
    """Names of settings: the flag or else the variable that gives each, and its text."""
    own: dict[str, tuple[str, str]] = {}
    for setting in _settings():
        flag = "MODEL" if setting.name == "model" else "--" + setting.name.replace("_", "-")
        variable = environment_variable(setting.name)
        if (text := getattr(arguments, setting.name, None)) is not None:
            own[setting.name] = (flag, text)
        elif variable in environment:
            own[setting.name] = (variable, environment[variable])
    return own


def explained(arguments: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> list[str]:
    """For the log: what each of TGI's variables became. ``config_from`` has raised nothing."""
    return explain_tgi(environment, frozenset(_own_settings(arguments, environment)))


def config_from(arguments: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> ServerConfig:
    """Settings from parsed flags, then ``INFLIGHTD_*`` variables, then TGI's, then defaults.

    Raises:
        ConfigError: naming the flag or variable whose value is wrong, or the two that do not fit together.
    """
    values: dict[str, Any] = {}
    try:
        from_tgi = tgi_settings(environment)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    own = _own_settings(arguments, environment)
    for setting in _settings():
        source, text = own.get(setting.name) or from_tgi.get(setting.name) or ("", None)
        if text is None:
            continue
        try:
            values[setting.name] = setting.metadata["parse"](text)
        except ValueError as error:
            raise ConfigError(f"{source}: {error}") from None
    config = ServerConfig(**values)
    if (
        config.max_num_batched_tokens is not None
        and config.max_num_seqs is not None
        and config.max_num_batched_tokens < config.max_num_seqs
    ):
        raise ConfigError(
            f"--max-num-batched-tokens ({config.max_num_batched_tokens}) must be at least --max-num-seqs "
            f"({config.max_num_seqs}): each running sequence gets a token in every step"
        )
    _check_admin(config)
    if config.ssl_keyfile is not None and config.ssl_certfile is None:
        raise ConfigError("--ssl-keyfile needs --ssl-certfile")
    return config


def _check_admin(config: ServerConfig) -> None:
    if config.admin_port is None and config.admin_uds is None:
        if config.admin_keys:
            raise ConfigError("--admin-key and --admin-key-file need --admin-port or --admin-uds")
    elif config.admin_uds is None and not config.admin_keys:
        # Every user, and every web page in a browser, of a machine reaches its ports, loopback or not.
        raise ConfigError("--admin-port needs --admin-key-file or --admin-key; --admin-uds works without")
