"""The Celery side: app, routing, tasks and the host watcher."""
