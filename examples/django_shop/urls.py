"""Addresses of the project."""

from django.contrib import admin
from django.urls import path

from shop.views import page

urlpatterns = [path("admin/", admin.site.urls), path("pages/<str:name>", page)]
