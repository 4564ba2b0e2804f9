"""Integrations: Celery, FastAPI and Starlette, Django, gunicorn and uWSGI, schedulers and cron.

Each is a module of its own, needs the program that it is for, and says so if that is missing.
"""
