"""What one server allows and how long it stores what it was given. Read as `limits.NAME`, so that one place sets it."""

MAX_FILE_MEGABYTES = 30
MAX_WAITING = 100  # requests in the queue
MAX_POINTS = 1000  # of one request
RESULT_SECONDS = 1800  # since a result was last used
MAX_PAIRS, MAX_COLLECTIONS = 64, 8  # results in memory, some 8 and 30 MB each
RESULTS_PER_VISITOR = 4
FILE_SECONDS = 3600  # uploads and result files on the disk
TRIM_SECONDS = 20  # between two times that free memory is given back
MAX_SESSIONS = 256  # of which gradio remembers what their pages show; its own limit is 10,000
