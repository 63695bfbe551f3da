"""The embedded registry's files: its configuration, and the certificate that its tokens are checked with.

Configuration: https://distribution.github.io/distribution/about/configuration/
"""

import hashlib
import json

from cli.home import write_private
from cli.places import registry_certificate, registry_config, registry_folder
from kiln.registry_tokens import ISSUER, SERVICE, make_key_file, write_certificate
from kiln.settings import Settings, SettingsError


def prepare_registry(settings: Settings) -> None:
    """Writes what the registry reads at its start; makes the key if there is none. Raises KilnError."""
    key_file = settings.registry_key_file
    try:
        make_key_file(key_file)
        write_certificate(key_file, registry_certificate(settings))
    except OSError as error:
        raise SettingsError(f"KILN_REGISTRY_TOKEN_KEY: {key_file} cannot be made: {error.strerror}") from None
    # JSON is YAML, which the registry reads.
    write_private(registry_config(settings), json.dumps(_configuration(settings), indent=1))


def _configuration(settings: Settings) -> dict[str, object]:
    return {
        "version": "0.1",
        "log": {"level": "error", "accesslog": {"disabled": True}},
        "storage": {
            "filesystem": {"rootdirectory": str(registry_folder(settings))},
            "delete": {"enabled": True},
            "maintenance": {"uploadpurging": {"enabled": True, "age": "24h", "interval": "6h", "dryrun": False}},
        },
        "http": {"addr": f"127.0.0.1:{settings.registry_port}", "secret": _upload_secret(settings)},
        "auth": {
            "token": {
                "realm": f"{settings.base_url}/registry/token",
                "service": SERVICE,
                "issuer": ISSUER,
                "rootcertbundle": str(registry_certificate(settings)),
            }
        },
    }


def _upload_secret(settings: Settings) -> str:
    """Signs the state of uploads, which then go on after a restart."""
    return hashlib.sha256(b"uploads" + settings.registry_key_file.read_bytes()).hexdigest()
