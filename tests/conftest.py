import os

# Before torch is imported: tiny models gain nothing from threads, and accelerate warns where the number is left open.
os.environ.setdefault("OMP_NUM_THREADS", "1")
