"""What a Celery worker needs to know; on its PYTHONPATH, where Dagster's Celery application looks for this name."""

import os

broker_url = os.environ["CELERY_BROKER_URL"]
result_backend = os.environ["CELERY_BROKER_URL"]
broker_connection_retry_on_startup = True
broker_connection_max_retries = None  # for ever: Redis may be away for as long as it likes
worker_prefetch_multiplier = 1
# A run is not tried again by Celery: Dagster does that, when it knows that the run is lost.
task_acks_late = False
# A process makes many runs, and pays its start once; then it is replaced, so that nothing it keeps adds up.
worker_max_tasks_per_child = 200
# What a run logs has a time and a level of its own; Celery would call each line a warning.
worker_redirect_stdouts = False
