"""Where a stack's files and its API are; light enough for every command to import."""

from pathlib import Path

from kiln.settings import Settings

WILDCARD_HOSTS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  to call, not to listen on


def api_url(settings: Settings) -> str:
    """Where this host reaches the API."""
    host = WILDCARD_HOSTS.get(settings.api_host, settings.api_host)
    return f"http://{f'[{host}]' if ':' in host else host}:{settings.api_port}"


def api_key_file(settings: Settings) -> Path:
    """The admin key of the first start, mode 0600."""
    return settings.home_dir / "api-key"


def runner_token_file(settings: Settings) -> Path:
    """The token of the stack's own runner, mode 0600."""
    return settings.home_dir / "runner-token"


def secret_key_file(settings: Settings) -> Path:
    """The key that secrets are sealed with unless KILN_SECRET_KEY is set, mode 0600."""
    return settings.home_dir / "secret-key"


def lock_file(settings: Settings) -> Path:
    """Locked (flock) by the stack that runs on the home."""
    return settings.home_dir / "lock"


def log_file(settings: Settings, part: str) -> Path:
    """A part's output."""
    return settings.home_dir / "logs" / f"{part}.log"


def registry_folder(settings: Settings) -> Path:
    """The embedded registry's storage."""
    return settings.home_dir / "registry"


def registry_config(settings: Settings) -> Path:
    """The embedded registry's configuration, written at every start, mode 0600."""
    return settings.home_dir / "registry.yml"


def registry_certificate(settings: Settings) -> Path:
    """What the embedded registry checks Kiln's tokens with."""
    return settings.home_dir / "registry.crt"
