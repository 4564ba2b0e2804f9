"""Integrations: Celery, FastAPI and Starlette, Django, gunicorn and uWSGI, schedulers and cron.

Each is a module of its own, and raises an error that names its package if that is missing.
"""
