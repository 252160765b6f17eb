"""What one server allows and how long it stores what it was given. Read as `limits.NAME`, so that one place sets it."""

MAX_FILE_MEGABYTES = 30
MAX_BODY_BYTES = 1_000_000  # of a request that is no upload
MAX_WAITING = 100  # requests in the queue
MAX_POINTS = 1000  # of one request
MAX_HINTS = 20  # points of a photo that say which object is meant
RESULT_SECONDS = 1800  # since a result was last used
MAX_PAIRS, MAX_COLLECTIONS = 64, 8  # results in memory, some 8 and 30 MB each
RESULTS_PER_VISITOR = 4
FILE_SECONDS = 3600  # uploads and result files on the disk
TRIM_SECONDS = 20  # between two times that free memory is given back
MAX_SESSIONS = 256  # of which gradio remembers what their pages show; its own limit is 10,000

# Runs of the network at once, and requests that gradio starts at once: the others of these wait for their files.
AT_ONCE = {"pair": 2, "collection": 1}
STARTED = {"pair": 10, "collection": 4}

# What reading an image may take, see `reading.py`.
MAX_PIXELS = 51_000_000  # phones take up to 50.3; all results have the size of the original
# (seconds of processor time, bytes, processes, how many may wait, priority) of a lane. A photo of 12 megapixels takes
# 0.1 s and 100 MB.
QUICK_READING = (0.7, 160_000_000, 2, 60, 0)
SLOW_READING = (3.5, 700_000_000, 1, 4, 5)
READING_PATIENCE = 60  # seconds in which one's turn must come, and then a file be read, on a busy machine
WHOLE_PIXELS = 60_000_000  # of originals whose masks and cutouts are made at once; 16 bytes each
