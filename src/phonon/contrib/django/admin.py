"""The admin's page: processes, and parked batches."""

from typing import TYPE_CHECKING, Any

from django.conf import settings
from django.contrib import admin, messages
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.response import TemplateResponse

from phonon.contrib.django import get_process
from phonon.contrib.django.models import ParkedBatch
from phonon.errors import PhononError

if TYPE_CHECKING:
    _Admin = admin.ModelAdmin[ParkedBatch]
else:
    _Admin = admin.ModelAdmin


@admin.register(ParkedBatch)
class ParkedBatchAdmin(_Admin):
    """Lists parked batches, and replays or discards them.

    The list links to the operations page if ``settings.PHONON_PAGE`` has its address.
    """

    def has_add_permission(self, request: HttpRequest) -> bool:
        """Return False: only Phonon parks batches."""
        del request
        return False

    def changelist_view(
        self, request: HttpRequest, extra_context: dict[str, Any] | None = None
    ) -> HttpResponse:
        """Show the list, or carry out the act of one of its buttons."""
        process = get_process()
        if request.method == "POST":
            self._act(request)
            return HttpResponseRedirect(request.path)
        context = {
            **self.admin_site.each_context(request),
            "title": "Parked batches",
            "opts": ParkedBatch._meta,
            "parked": process.parked(),
            "page": getattr(settings, "PHONON_PAGE", None),
            "may_act": _may_act(request),
            **(extra_context or {}),
        }
        return TemplateResponse(request, "phonon/parked.html", context)

    def _act(self, request: HttpRequest) -> None:
        if not _may_act(request):
            messages.error(request, "Only superusers replay or discard batches.")
            return
        process = get_process()
        act = process.discard if request.POST.get("act") == "discard" else process.replay
        try:
            act(request.POST["resource"], int(request.POST["token"]))
        except PhononError as error:
            messages.error(request, str(error))
        except Exception as error:  # noqa: BLE001 - the error of the user's execute
            messages.error(request, f"It failed again: {error}")
        else:
            messages.success(request, f"Done: {act.__name__} {request.POST['resource']}.")


def _may_act(request: HttpRequest) -> bool:
    return bool(getattr(request.user, "is_superuser", False))
