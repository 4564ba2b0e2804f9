"""A page whose views are counted."""

from django.http import HttpRequest, HttpResponse

from phonon.contrib.django import add
from shop.models import Views


def page(request: HttpRequest, name: str) -> HttpResponse:
    """Show a page, and count the view."""
    add(Views, name, doc={"views": 1}, soft_session=60)
    return HttpResponse(f"this is {name}, {request.method}")
