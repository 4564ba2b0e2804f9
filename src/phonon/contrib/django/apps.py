"""The app: ``INSTALLED_APPS = [..., "phonon.contrib.django"]``."""

from typing import Any

from django.apps import AppConfig
from django.conf import settings
from django.core import checks


class PhononConfig(AppConfig):
    """Checks the settings, and puts the page into the admin."""

    name = "phonon.contrib.django"
    label = "phonon"
    verbose_name = "Phonon"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        """Register the check."""
        checks.register(check_settings)


def check_settings(**_: Any) -> list[checks.CheckMessage]:
    """Check ``settings.PHONON``."""
    found: Any = getattr(settings, "PHONON", {})
    if isinstance(found, dict) and all(isinstance(name, str) for name in found):
        return []
    return [
        checks.Error(
            f"PHONON is {found!r}",
            hint='It is a dict of arguments of phonon.Process: {"url": "redis://localhost/1"}.',
            id="phonon.E001",
        )
    ]
